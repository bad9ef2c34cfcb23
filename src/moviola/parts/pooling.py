"""Pooling a video's frames for a query, and exact ranking without the N x M x D tensor.

A query-conditioned pooler gives every video another vector for every text. Written out, N texts
against M videos need N*M*D numbers (2 GB for 1000 x 1000 x 512) and, with X-Pool's pooler, 4*N*M*D^2
operations. The `*_scores` functions below compute the same cosines in O(N*M*T*D), from three facts:

1. The pooled vector is `sum_t w_t u_t`: weights from the query, vectors from the video alone. Linear
   maps after the attention can be applied to the u_t once per video.
2. A norm needs T numbers, not D: `|sum_t w_t u_t| = |R w|` with R'R = G, the T x T Gram matrix of u.
3. LayerNorm only centres (linear, so fact 1) and divides by `sqrt(variance + eps)` (fact 2).

With H heads every (head, frame) is a token of its own with its own weight, so T becomes H*T. This
holds without dropout, and for poolers without a nonlinearity between pooling and cosine.

The Gram matrices are factorised in float64 where the device has it, see `_root`: the result is as
accurate as the written-out form, also where frames nearly cancel.

Axis letters: N texts, M videos, T frames, D width, H heads, K width of one head, J = H*T tokens.
Masks are True where a frame is real. Texts and frames are raw unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.types import UsageError

__all__ = [
    "FoldedVideos",
    "PoolerWeights",
    "baseline_pool",
    "check_pooling_inputs",
    "cosine_scores",
    "fold_videos",
    "folded_scores",
    "frame_weights",
    "pooler_scores",
    "softmax_pool",
    "softmax_pool_scores",
    "topk_pool",
]

MEMORY = 256 * 2**20  # bytes of temporary tensors that the fast forms aim to stay under
_TEXT_BLOCK = 1024
_TINY = 1e-12  # smallest norm divided by: a zero vector gets similarity 0, never NaN


def check_pooling_inputs(text_ND: Tensor, frames_MTD: Tensor, mask_MT: Tensor | None = None) -> None:
    """Raise `UsageError` for shapes that do not fit, no frames, NaN, or a video without a real frame."""
    if text_ND.ndim != 2 or frames_MTD.ndim != 3 or text_ND.shape[1] != frames_MTD.shape[2]:
        raise UsageError(
            "Pooling needs texts (N, D) and frames (M, T, D) of the same width, got "
            f"{tuple(text_ND.shape)} and {tuple(frames_MTD.shape)}."
        )
    if frames_MTD.shape[1] == 0:
        raise UsageError("Pooling needs at least one frame per video, got none.")
    if mask_MT is not None:
        if mask_MT.shape != frames_MTD.shape[:2] or mask_MT.dtype != torch.bool:
            raise UsageError(
                f"The mask must be bool of shape {tuple(frames_MTD.shape[:2])}, got {mask_MT.dtype} "
                f"{tuple(mask_MT.shape)}."
            )
        if not bool(mask_MT.any(1).all()):
            raise UsageError(f"{int((~mask_MT.any(1)).sum())} videos have no real frame in their mask.")
    real_MTD = frames_MTD if mask_MT is None else frames_MTD[mask_MT]
    if not bool(torch.isfinite(text_ND).all()) or not bool(torch.isfinite(real_MTD).all()):
        raise UsageError("Texts or frames hold NaN or infinite numbers.", hint="Check the encoder's input.")


# --------------------------------------------------------------------------------------------------
# Written out: (M, N, D), for training and tests
# --------------------------------------------------------------------------------------------------


def cosine_scores(text_ND: Tensor, pooled_MND: Tensor) -> Tensor:
    """Cosine of each text with the vector pooled for it: (N, M). `pooled` may also be (M, D)."""
    text_ND, pooled = F.normalize(text_ND, dim=-1), F.normalize(pooled_MND, dim=-1)
    if pooled.ndim == 2:
        return text_ND @ pooled.T
    return torch.einsum("nd,mnd->nm", text_ND, pooled)


def topk_pool(text_ND: Tensor, frames_MTD: Tensor, k: int, mask_MT: Tensor | None = None) -> Tensor:
    """The sum of the k frames most similar to each text (dot product): (M, N, D).

    With normalised inputs this is X-Pool's `topk` baseline. A video with fewer real frames than k
    gives the sum of those it has.
    """
    if not 1 <= k <= frames_MTD.shape[1]:
        raise UsageError(f"k must be between 1 and the {frames_MTD.shape[1]} frames, got {k}.")
    sims_MNT = _masked(text_ND @ frames_MTD.transpose(1, 2), mask_MT)
    best_MNK = sims_MNT.topk(k, dim=-1)
    chosen_MNT = torch.zeros_like(sims_MNT).scatter(-1, best_MNK.indices, 1.0)
    if mask_MT is not None:
        chosen_MNT = chosen_MNT * mask_MT.unsqueeze(1)
        frames_MTD = frames_MTD.masked_fill(~mask_MT.unsqueeze(-1), 0)
    return chosen_MNT @ frames_MTD


def softmax_pool(
    text_ND: Tensor, frames_MTD: Tensor, temperature: float, mask_MT: Tensor | None = None
) -> Tensor:
    """Frames weighted by `softmax(text . frame / temperature)`: (M, N, D). No parameters.

    With normalised inputs and temperature 0.01 this is X-Pool's `attention` baseline.
    """
    weights_MNT = _masked(text_ND @ frames_MTD.transpose(1, 2) / temperature, mask_MT).softmax(-1)
    if mask_MT is not None:
        frames_MTD = frames_MTD.masked_fill(~mask_MT.unsqueeze(-1), 0)
    return weights_MNT @ frames_MTD


def baseline_pool(
    kind: Literal["avg", "topk", "attention"],
    text_ND: Tensor,
    frames_MTD: Tensor,
    *,
    k: int = 3,
    temperature: float = 0.01,
) -> Tensor:
    """X-Pool's three baselines, poolers without parameters, on texts and frames it normalises itself.

    `avg` gives (M, D); `topk`, the sum of the k nearest frames, and `attention`, a softmax over
    frames of cosine / temperature, give (M, N, D).
    """
    check_pooling_inputs(text_ND, frames_MTD)
    text_ND, frames_MTD = F.normalize(text_ND, dim=-1), F.normalize(frames_MTD, dim=-1)
    if kind == "avg":
        return frames_MTD.mean(1)
    if kind == "topk":
        return topk_pool(text_ND, frames_MTD, k)
    return softmax_pool(text_ND, frames_MTD, temperature)


def _masked(logits_MNT: Tensor, mask_MT: Tensor | None) -> Tensor:
    return logits_MNT if mask_MT is None else logits_MNT.masked_fill(~mask_MT.unsqueeze(1), -math.inf)


# --------------------------------------------------------------------------------------------------
# The exact fast form: a video is folded once, then scored against any number of texts
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoolerWeights:
    """The parts of a pooler of X-Pool's shape, in the order they are applied.

    `norm_in` on texts and frames; query, key, value maps; attention over frames with `heads` heads;
    `out`; `norm_mid`; the residual linear map `x + residual(x)`; `norm_out`; cosine with the text.
    """

    norm_in: nn.LayerNorm
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    norm_mid: nn.LayerNorm
    residual: nn.Linear
    norm_out: nn.LayerNorm
    heads: int


@dataclass(frozen=True)
class FoldedVideos:
    """What is left of M videos once everything that does not depend on the text is done.

    keys_HMTK give the attention weights w. The vector before the last LayerNorm's scale is
    `s * sum_j w_j c_j + r`; the final one is `s' * (s * sum_j w_j e_j + f) + shift`. late_MJD are the
    e_j. Each root R satisfies R'R = Gram matrix, so that `|R w|` is the norm wanted: root_mid for
    the first variance (giving s), root_late over (c, r) for the second (giving s'), root_last over
    (e, f, shift) for the final norm.
    """

    keys_HMTK: Tensor
    mask_MT: Tensor | None
    root_mid_MJJ: Tensor
    root_late_MJJ: Tensor
    root_last_MJJ: Tensor
    late_MJD: Tensor
    f_D: Tensor
    shift_D: Tensor


def fold_videos(frames_MTD: Tensor, weights: PoolerWeights, mask_MT: Tensor | None = None) -> FoldedVideos:
    """Everything about the videos that no text changes. Memory: M*T*(H + 1)*D plus small matrices."""
    if mask_MT is not None:  # what lies in a masked frame, NaN included, must not matter
        frames_MTD = frames_MTD.masked_fill(~mask_MT.unsqueeze(-1), 0)
    heads, width = weights.heads, frames_MTD.shape[-1]
    frames_MTD = weights.norm_in(frames_MTD)
    keys_HMTK = weights.key(frames_MTD).unflatten(-1, (heads, -1)).movedim(2, 0)
    value_MTHK = weights.value(frames_MTD).unflatten(-1, (heads, -1))
    out_HKD = weights.out.weight.T.unflatten(0, (heads, -1))
    # The weights of one head sum to 1, so the output's bias is shared out over the heads.
    u_MHTD = torch.einsum("mthk,hkd->mhtd", value_MTHK, out_HKD) + weights.out.bias / heads
    u_MJD = _centred(u_MHTD.flatten(1, 2))

    mid_MJD, mid_D = u_MJD * weights.norm_mid.weight, weights.norm_mid.bias
    c_MJD = _centred(mid_MJD + F.linear(mid_MJD, weights.residual.weight))
    r_D = _centred(mid_D + weights.residual(mid_D))
    e_MJD, f_D = c_MJD * weights.norm_out.weight, r_D * weights.norm_out.weight
    shift_D = weights.norm_out.bias
    return FoldedVideos(
        keys_HMTK,
        mask_MT,
        _root(u_MJD) / math.sqrt(width),
        _root(_with(c_MJD, r_D)) / math.sqrt(width),
        _root(_with(e_MJD, f_D, shift_D)),
        e_MJD,
        f_D,
        shift_D,
    )


def folded_scores(text_ND: Tensor, videos: FoldedVideos, weights: PoolerWeights) -> Tensor:
    """Cosines of raw texts with the videos pooled for them: (N, M), all at once."""
    query_NHK = weights.query(weights.norm_in(text_ND)).unflatten(-1, (weights.heads, -1))
    w_MJN = _head_weights(query_NHK, videos.keys_HMTK, videos.mask_MT)
    tokens = w_MJN.shape[1]
    s_M1N = (_square(videos.root_mid_MJJ @ w_MJN) + weights.norm_mid.eps).rsqrt()
    late_MJN = videos.root_late_MJJ[:, :, :tokens] @ w_MJN
    late_MJN.mul_(s_M1N).add_(videos.root_late_MJJ[:, :, tokens:])
    late_M1N = (_square(late_MJN) + weights.norm_out.eps).rsqrt()  # s' of the class above
    last_MJN = videos.root_last_MJJ[:, :, :tokens] @ w_MJN
    last_MJN.mul_(s_M1N).add_(videos.root_last_MJJ[:, :, tokens : tokens + 1])
    last_MJN.mul_(late_M1N).add_(videos.root_last_MJJ[:, :, tokens + 1 :])
    norm_M1N = _square(last_MJN).sqrt().clamp_min(_TINY)

    text_ND = F.normalize(text_ND, dim=-1)
    along_MJN = videos.late_MJD @ text_ND.T
    dot_M1N = along_MJN.mul_(w_MJN).sum(1, keepdim=True).mul_(s_M1N).add_(text_ND @ videos.f_D)
    dot_M1N = dot_M1N.mul_(late_M1N).add_(text_ND @ videos.shift_D)
    return (dot_M1N / norm_M1N).squeeze(1).T


@torch.no_grad()
def pooler_scores(
    text_ND: Tensor,
    frames_MTD: Tensor,
    weights: PoolerWeights,
    mask_MT: Tensor | None = None,
    *,
    memory: int = MEMORY,
) -> Tensor:
    """Cosine of every text with every video as X-Pool's pooler pools it for that text: (N, M).

    Equal to the written-out form without dropout, to rounding. Blocks of videos keep the temporary
    tensors near `memory` bytes. For ranking: the result carries no gradient.
    """
    check_pooling_inputs(text_ND, frames_MTD, mask_MT)
    frames, width = frames_MTD.shape[1:]
    tokens = weights.heads * frames
    per_video = 4 * width * (3 * frames + 3 * tokens) + 24 * (tokens + 2) ** 2

    def block(videos: slice) -> Tensor:
        folded = fold_videos(frames_MTD[videos], weights, None if mask_MT is None else mask_MT[videos])
        return torch.cat([folded_scores(text, folded, weights) for text in text_ND.split(_TEXT_BLOCK)])

    return _in_blocks(block, len(text_ND), len(frames_MTD), per_video, tokens + 2, memory)


@torch.no_grad()
def softmax_pool_scores(
    text_ND: Tensor,
    frames_MTD: Tensor,
    temperature: float,
    mask_MT: Tensor | None = None,
    *,
    memory: int = MEMORY,
) -> Tensor:
    """Cosine of every text with `softmax_pool` of every video, from normalised inputs: (N, M)."""
    check_pooling_inputs(text_ND, frames_MTD, mask_MT)
    frames, width = frames_MTD.shape[1:]
    text_ND = F.normalize(text_ND, dim=-1)

    def block(videos: slice) -> Tensor:
        mask = None if mask_MT is None else mask_MT[videos]
        frames_mTD = frames_MTD[videos]
        if mask is not None:
            frames_mTD = frames_mTD.masked_fill(~mask.unsqueeze(-1), 0)
        frames_mTD = F.normalize(frames_mTD, dim=-1)
        root_mTT = _root(frames_mTD)
        rows = []
        for text in text_ND.split(_TEXT_BLOCK):
            along_mTN = frames_mTD @ text.T
            w_mTN = _hidden(along_mTN / temperature, mask).softmax(1)
            norm_m1N = _square(root_mTT @ w_mTN).sqrt().clamp_min(_TINY)
            rows.append((along_mTN.mul_(w_mTN).sum(1, keepdim=True) / norm_m1N).squeeze(1).T)
        return torch.cat(rows)

    return _in_blocks(block, len(text_ND), len(frames_MTD), 4 * width * frames, frames, memory)


def _in_blocks(
    block: Callable[[slice], Tensor], texts: int, videos: int, per_video: int, tokens: int, memory: int
) -> Tensor:
    """Some videos at a time against all texts, so that each video is folded once."""
    per_video += min(texts, _TEXT_BLOCK) * tokens * 8 * 5  # a handful of (J, N) tensors are alive
    step = max(1, memory // per_video)
    return torch.cat([block(slice(m, m + step)) for m in range(0, max(videos, 1), step)], dim=1)


def frame_weights(
    text_ND: Tensor, frames_MTD: Tensor, weights: PoolerWeights, mask_MT: Tensor | None = None
) -> Tensor:
    """How much each text looks at each frame, averaged over heads: (N, M, T), rows sum to 1."""
    check_pooling_inputs(text_ND, frames_MTD, mask_MT)
    if mask_MT is not None:
        frames_MTD = frames_MTD.masked_fill(~mask_MT.unsqueeze(-1), 0)
    query_NHK = weights.query(weights.norm_in(text_ND)).unflatten(-1, (weights.heads, -1))
    keys_HMTK = weights.key(weights.norm_in(frames_MTD)).unflatten(-1, (weights.heads, -1)).movedim(2, 0)
    w_MJN = _head_weights(query_NHK, keys_HMTK, mask_MT)
    return w_MJN.unflatten(1, (weights.heads, -1)).mean(1).movedim(-1, 0)


def _head_weights(query_NHK: Tensor, keys_HMTK: Tensor, mask_MT: Tensor | None) -> Tensor:
    """Softmax over the frames of each head: (M, J, N)."""
    query_HKN = query_NHK.permute(1, 2, 0) / math.sqrt(query_NHK.shape[-1])
    logits_HMTN = (keys_HMTK.flatten(1, 2) @ query_HKN).unflatten(1, keys_HMTK.shape[1:3])
    return _hidden(logits_HMTN, mask_MT).softmax(2).movedim(0, 1).flatten(1, 2)


def _hidden(logits_MTN: Tensor, mask_MT: Tensor | None) -> Tensor:
    return logits_MTN if mask_MT is None else logits_MTN.masked_fill(~mask_MT.unsqueeze(-1), -math.inf)


def _root(x_MJD: Tensor) -> Tensor:
    """R with R'R = x x', so that |R w| = |sum_j w_j x_j| without leaving J numbers: (M, J, J).

    A norm taken through R is as accurate as one of the summed vectors themselves, also where these
    nearly cancel; `w' G w` would square the rounding error. The factor comes from float64 (where the
    device has it), with a diagonal a few rounding errors high so that dependent frames factorise.
    """
    wide = torch.float32 if x_MJD.device.type == "mps" else torch.float64
    x_wide = x_MJD.to(wide)
    gram_MJJ = x_wide @ x_wide.mT
    largest_M = gram_MJJ.diagonal(dim1=1, dim2=2).amax(1)
    lift_M = largest_M * (4 * gram_MJJ.shape[1] * torch.finfo(wide).eps) + torch.finfo(wide).tiny
    gram_MJJ.diagonal(dim1=1, dim2=2).add_(lift_M.unsqueeze(1))
    return torch.linalg.cholesky(gram_MJJ).mT.to(x_MJD.dtype)


def _square(x_MJN: Tensor) -> Tensor:
    """The squared norm over the tokens: (M, 1, N)."""
    return torch.linalg.vector_norm(x_MJN, dim=1, keepdim=True).square_()


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _with(x_MJD: Tensor, *rows_D: Tensor) -> Tensor:
    """The same extra tokens behind those of every video."""
    return torch.cat([x_MJD, *(row.expand(len(x_MJD), 1, -1) for row in rows_D)], dim=1)
