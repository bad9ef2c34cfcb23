"""Contrastive losses of large batches without the B x B matrix of logits in memory.

The matrix is made a band of rows at a time, reduced, and made again in the backward pass: memory is
O(B * chunk) instead of O(B * B), and the arithmetic of the towers dwarfs the second product. Values
and gradients equal the plain losses to rounding.

Axis letters: N anchors, M others, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moviola.types import UsageError

CHUNK = 1024
"""Rows of logits that exist at a time."""


class _LogSumExp(torch.autograd.Function):
    """log sum exp of scale * a b^T over its rows and over its columns, in bands of rows."""

    @staticmethod
    def forward(
        ctx: Any, a_ND: Tensor, b_MD: Tensor, scale: Tensor, leave_out: bool, chunk: int
    ) -> tuple[Tensor, Tensor]:
        rows, columns = [], a_ND.new_full((len(b_MD),), -torch.inf)
        for start in range(0, len(a_ND), chunk):
            _, logits_CM = _band(a_ND, b_MD, scale, start, chunk, leave_out)
            rows.append(logits_CM.logsumexp(1))
            columns = torch.logaddexp(columns, logits_CM.logsumexp(0))
        rows_N = torch.cat(rows)
        ctx.save_for_backward(a_ND, b_MD, scale, rows_N, columns)
        ctx.leave_out, ctx.chunk = leave_out, chunk
        return rows_N, columns

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        a_ND, b_MD, scale, rows_N, columns_M = ctx.saved_tensors
        grad_rows_N, grad_columns_M = grads
        grad_a, grad_b = torch.empty_like(a_ND), torch.zeros_like(b_MD)
        grad_scale = torch.zeros_like(scale)
        for start in range(0, len(a_ND), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            cosine_CM, logits_CM = _band(a_ND, b_MD, scale, start, ctx.chunk, ctx.leave_out)
            grad_CM = grad_rows_N[part, None] * (logits_CM - rows_N[part, None]).exp()
            grad_CM += grad_columns_M * (logits_CM - columns_M).exp()
            with torch.autocast(a_ND.device.type, enabled=False):
                grad_a[part] = scale * (grad_CM @ b_MD)
                grad_b += scale * (grad_CM.T @ a_ND[part])
            grad_scale += (grad_CM * cosine_CM).sum()
        return grad_a, grad_b, grad_scale, None, None


def _band(
    a_ND: Tensor, b_MD: Tensor, scale: Tensor, start: int, chunk: int, leave_out: bool
) -> tuple[Tensor, Tensor]:
    """Dot products and logits of some rows; with `leave_out` the logits of own pairs are -inf."""
    with torch.autocast(a_ND.device.type, enabled=False):
        cosine_CM = a_ND[start : start + chunk] @ b_MD.T
    logits_CM = scale * cosine_CM
    if leave_out:
        own = torch.arange(len(logits_CM), device=a_ND.device)
        logits_CM[own, start + own] = -torch.inf
    return cosine_CM, logits_CM


def log_sum_exp(
    a_ND: Tensor, b_MD: Tensor, scale: Tensor | float, *, leave_out: bool = False, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """log sum_j exp(scale * a_i . b_j) for every i, and the same over i for every j: (N,) and (M,).

    `leave_out` leaves the pair i = j out of both sums (needs N = M >= 2). Differentiable in a, b and
    scale. Runs in the vectors' own precision, whatever autocast says.
    """
    if a_ND.ndim != 2 or b_MD.ndim != 2 or a_ND.shape[1] != b_MD.shape[1] or not len(a_ND) or not len(b_MD):
        raise UsageError(
            f"Expected two non-empty sets of vectors of one width, got {tuple(a_ND.shape)} and "
            f"{tuple(b_MD.shape)}."
        )
    if leave_out and (len(a_ND) != len(b_MD) or len(a_ND) < 2):
        raise UsageError(
            f"Leaving the own pair out needs as many anchors as others, at least 2, got {len(a_ND)} and "
            f"{len(b_MD)}.",
            hint="Raise the batch size.",
        )
    scale = torch.as_tensor(scale, dtype=a_ND.dtype, device=a_ND.device)
    return _LogSumExp.apply(a_ND, b_MD, scale, leave_out, chunk)


def paired_cross_entropy(
    image_ND: Tensor,
    text_ND: Tensor,
    scale: Tensor | float,
    *,
    smoothing: float = 0.0,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """CLIP's cross-entropies, one per picture and one per text: row i belongs to row i.

    image_ND and text_ND as they are (normalise first), logits scale * image . text, `smoothing` spreads
    that share of the target over all. Their means' mean is the symmetric InfoNCE loss.
    """
    check_pairs(image_ND, text_ND)
    images_N, texts_N = log_sum_exp(image_ND, text_ND, scale, chunk=chunk)
    own_N = scale * (image_ND * text_ND).sum(-1)
    if not smoothing:
        return images_N - own_N, texts_N - own_N
    spread_images_N = scale * (image_ND @ text_ND.mean(0))
    spread_texts_N = scale * (text_ND @ image_ND.mean(0))
    kept_N = (1 - smoothing) * own_N
    return images_N - kept_N - smoothing * spread_images_N, texts_N - kept_N - smoothing * spread_texts_N


def info_nce(
    image_ND: Tensor,
    text_ND: Tensor,
    scale: Tensor | float,
    *,
    smoothing: float = 0.0,
    chunk: int = CHUNK,
) -> Tensor:
    """Symmetric InfoNCE (CLIP, Figure 3): the mean of both directions of `paired_cross_entropy`."""
    images_N, texts_N = paired_cross_entropy(image_ND, text_ND, scale, smoothing=smoothing, chunk=chunk)
    return (images_N.mean() + texts_N.mean()) / 2


def cross_entropy(
    query_ND: Tensor, key_MD: Tensor, target_N: Tensor, scale: Tensor | float, *, chunk: int = CHUNK
) -> Tensor:
    """Cross-entropy of each query over all keys, its target's row number in `target_N`: (N,)."""
    rows_N, _ = log_sum_exp(query_ND, key_MD, scale, chunk=chunk)
    return rows_N - scale * (query_ND * key_MD[target_N]).sum(-1)


def sigmoid_loss(
    image_ND: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor, *, chunk: int = CHUNK
) -> Tensor:
    """SigLIP's loss (arXiv 2303.15343, Algorithm 1): every cell of the matrix is a yes or no of its own.

    Logits scale * image . text + bias; sum of -log sigmoid(+-logit) over all cells, divided by N.
    """
    check_pairs(image_ND, text_ND)
    own_N = scale * (image_ND * text_ND).sum(-1) + bias
    # -log sigmoid(-x) = softplus(x) for all cells; own pairs are -log sigmoid(x) = softplus(x) - x
    return (softplus_sum(image_ND, text_ND, scale, bias, chunk) - own_N.sum()) / len(image_ND)


class _SoftplusSum(torch.autograd.Function):
    """The sum of softplus(scale * a b^T + bias) over all cells, in bands of rows."""

    @staticmethod
    def forward(ctx: Any, a_ND: Tensor, b_MD: Tensor, scale: Tensor, bias: Tensor, chunk: int) -> Tensor:
        total = a_ND.new_zeros(())
        for start in range(0, len(a_ND), chunk):
            _, logits_CM = _band(a_ND, b_MD, scale, start, chunk, False)
            total += F.softplus(logits_CM + bias).sum()
        ctx.save_for_backward(a_ND, b_MD, scale, bias)
        ctx.chunk = chunk
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        a_ND, b_MD, scale, bias = ctx.saved_tensors
        (grad,) = grads
        grad_a, grad_b = torch.empty_like(a_ND), torch.zeros_like(b_MD)
        grad_scale, grad_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        for start in range(0, len(a_ND), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            cosine_CM, logits_CM = _band(a_ND, b_MD, scale, start, ctx.chunk, False)
            grad_CM = grad * (logits_CM + bias).sigmoid()
            with torch.autocast(a_ND.device.type, enabled=False):
                grad_a[part] = scale * (grad_CM @ b_MD)
                grad_b += scale * (grad_CM.T @ a_ND[part])
            grad_scale += (grad_CM * cosine_CM).sum()
            grad_bias += grad_CM.sum()
        return grad_a, grad_b, grad_scale, grad_bias, None


def softplus_sum(a_ND: Tensor, b_MD: Tensor, scale: Tensor, bias: Tensor, chunk: int = CHUNK) -> Tensor:
    """sum_ij softplus(scale * a_i . b_j + bias), differentiable in all four."""
    return _SoftplusSum.apply(a_ND, b_MD, scale, bias, chunk)


def check_pairs(image_ND: Tensor, text_ND: Tensor) -> None:
    """Row i of one belongs to row i of the other: equal shapes, or `UsageError`."""
    if image_ND.shape != text_ND.shape or image_ND.ndim != 2 or not len(image_ND):
        raise UsageError(
            f"Expected one text per picture, vectors of one width, got pictures {tuple(image_ND.shape)} "
            f"and texts {tuple(text_ND.shape)}."
        )
