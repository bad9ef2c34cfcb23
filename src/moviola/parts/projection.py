"""Vectors reduced to the strongest directions of their batch, with a gradient that is always finite.

Axis letters: B vectors, M their numbers (or the other way round), K directions kept, J dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moviola.types import UsageError


def primary_components(x_BM: Tensor, count: int) -> Tensor:
    """Rows reduced to their mean and their deviation from it along the `count` strongest directions: (B, M).

    The same as keeping the first right singular vectors of the centred rows. Rows that span no more
    directions (always where B <= count + 1) come back as they are. Differentiable once; two kept
    directions may be equally strong, where the gradient through an SVD is not finite. Runs in double
    precision, whatever autocast says. Raises `UsageError` for numbers that are not finite.
    """
    if x_BM.ndim != 2 or count < 1:
        raise UsageError(
            f"Expected vectors (B, M) and at least one direction, got {tuple(x_BM.shape)}, {count}."
        )
    if not bool(x_BM.isfinite().all()):
        raise UsageError("The vectors hold NaN or infinity, so they have no strongest directions.")
    if min(len(x_BM) - 1, x_BM.shape[1]) <= count:
        return x_BM
    # directions weaker than the rounding of the numbers themselves do not count
    noise = torch.finfo(torch.float32).eps * float(x_BM.detach().float().norm())
    with torch.autocast(x_BM.device.type, enabled=False):
        mean_1M = x_BM.mean(dim=0, keepdim=True)
        centred_BM = x_BM - mean_1M
        if len(x_BM) >= x_BM.shape[1]:
            return _Strongest.apply(centred_BM, count, noise) + mean_1M
        # the strongest directions of rows and of columns go together: the smaller side is enough
        return _Strongest.apply(centred_BM.T, count, noise).T + mean_1M


class _Strongest(torch.autograd.Function):
    """x P, where P projects onto the `count` strongest directions v_i of C = x^T x, strength s_i.

    When C moves by dC, P moves by the sum over kept i and dropped j of
    (v_j^T dC v_i) / (s_i^2 - s_j^2) (v_i v_j^T + v_j v_i^T): two kept directions never meet in a
    denominator. A gap between kept and dropped fades out of the gradient below `noise`.
    """

    @staticmethod
    def forward(ctx: Any, x_BM: Tensor, count: int, noise: float) -> Tensor:
        # x^T x squares the spread of the strengths; double precision makes up for it. MPS has neither
        # double precision nor eigh.
        place = torch.device("cpu") if x_BM.device.type == "mps" else x_BM.device
        exact_BM = x_BM.to(place, torch.float64)
        strength2_M, directions_MM = torch.linalg.eigh(exact_BM.T @ exact_BM)
        strength_M = strength2_M.clamp_min(0).sqrt()
        ctx.whole = int((strength_M > noise).sum()) <= count
        if ctx.whole:
            return x_BM.clone()
        ctx.save_for_backward(exact_BM, strength_M, directions_MM)
        ctx.count, ctx.noise = count, noise
        kept_MK = directions_MM[:, -count:]
        return ((exact_BM @ kept_MK) @ kept_MK.T).to(x_BM)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (grad_BM,) = grads
        if ctx.whole:
            return grad_BM, None, None
        x_BM, strength_M, directions_MM = ctx.saved_tensors
        exact_BM = grad_BM.to(x_BM)
        dropped_MJ, kept_MK = directions_MM[:, : -ctx.count], directions_MM[:, -ctx.count :]
        weak_J, strong_K1 = strength_M[: -ctx.count], strength_M[-ctx.count :, None]
        gap_KJ = strong_K1 - weak_J
        inverse_KJ = gap_KJ / (gap_KJ**2 + ctx.noise**2) / (strong_K1 + weak_J)
        # K is small: every product here is of order B M K
        x_BK, grad_BK = x_BM @ kept_MK, exact_BM @ kept_MK
        mixed_KM = x_BK.T @ exact_BM + grad_BK.T @ x_BM
        turn_KM = (inverse_KJ * (mixed_KM @ dropped_MJ)) @ dropped_MJ.T
        made_BM = x_BK @ turn_KM + (x_BM @ turn_KM.T + grad_BK) @ kept_MK.T
        return made_BM.to(grad_BM), None, None
