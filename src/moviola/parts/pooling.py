"""Pooling a video's frames for a query, and exact ranking without the N x M x D tensor.

A query-conditioned pooler gives every video another vector for every text. Written out, N texts
against M videos need N*M*D numbers (2 GB for 1000 x 1000 x 512) and, with X-Pool's pooler, 4*N*M*D^2
operations. The `*_scores` functions below compute the same cosines in O(N*M*T*D), from three facts:

1. The pooled vector is `sum_t w_t u_t`: weights from the query, vectors from the video alone. Linear
   maps after the attention can be applied to the u_t once per video.
2. A squared norm is a quadratic form: `|sum_t w_t u_t|^2 = w' G w` with the T x T Gram matrix of u.
3. LayerNorm only centres (linear, so fact 1) and divides by `sqrt(variance + eps)` (fact 2).

With H heads every (head, frame) is a token of its own with its own weight, so T becomes H*T. This
holds without dropout, and for poolers without a nonlinearity between pooling and cosine.

Gram matrices and quadratic forms are summed in float64 where the device has it: a variance is then as
accurate as in the written-out form even when the frames nearly cancel.

Axis letters: N texts, M videos, T frames, D width, H heads, K width of one head, J = H*T tokens.
Masks are True where a frame is real. Texts and frames are raw unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.types import UsageError

__all__ = [
    "FoldedVideos",
    "PoolerWeights",
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

    keys_MHTK give the attention. The other fields describe the vector before the last LayerNorm's
    scale: `s * sum_j w_j c_j + r`, with s from `gram_mid`; its variance is `gram_late` over
    (c_1 ... c_J, r), and the squared norm of the final vector `gram_last` over
    (e_1 ... e_J, f, shift). `late_MJD`, `f_D`, `shift_D` give the dot product with the text.
    """

    keys_MHTK: Tensor
    mask_MT: Tensor | None
    gram_mid_MJJ: Tensor
    gram_late_MJJ: Tensor
    gram_last_MJJ: Tensor
    late_MJD: Tensor
    f_D: Tensor
    shift_D: Tensor


def fold_videos(frames_MTD: Tensor, weights: PoolerWeights, mask_MT: Tensor | None = None) -> FoldedVideos:
    """Everything about the videos that no text changes. Memory: M*T*(H + 1)*D plus small matrices."""
    if mask_MT is not None:  # what lies in a masked frame, NaN included, must not matter
        frames_MTD = frames_MTD.masked_fill(~mask_MT.unsqueeze(-1), 0)
    heads, width = weights.heads, frames_MTD.shape[-1]
    frames_MTD = weights.norm_in(frames_MTD)
    keys_MHTK = weights.key(frames_MTD).unflatten(-1, (heads, -1)).transpose(1, 2)
    value_MTHK = weights.value(frames_MTD).unflatten(-1, (heads, -1))
    out_HKD = weights.out.weight.T.unflatten(0, (heads, -1))
    # The weights of one head sum to 1, so the output's bias is shared out over the heads.
    u_MHTD = torch.einsum("mthk,hkd->mhtd", value_MTHK, out_HKD) + weights.out.bias / heads
    u_MJD = _centred(u_MHTD.flatten(1, 2))
    gram_mid_MJJ = _gram(u_MJD) / width

    mid_MJD = u_MJD * weights.norm_mid.weight
    c_MJD = _centred(mid_MJD + F.linear(mid_MJD, weights.residual.weight))
    shift_mid_D = weights.norm_mid.bias
    r_D = _centred(shift_mid_D + F.linear(shift_mid_D, weights.residual.weight) + weights.residual.bias)
    gram_late_MJJ = _gram(_with(c_MJD, r_D)) / width

    e_MJD, f_D = c_MJD * weights.norm_out.weight, r_D * weights.norm_out.weight
    shift_D = weights.norm_out.bias
    gram_last_MJJ = _gram(_with(e_MJD, f_D, shift_D))
    return FoldedVideos(keys_MHTK, mask_MT, gram_mid_MJJ, gram_late_MJJ, gram_last_MJJ, e_MJD, f_D, shift_D)


def folded_scores(text_ND: Tensor, videos: FoldedVideos, weights: PoolerWeights) -> Tensor:
    """Cosines of raw texts with the videos pooled for them: (N, M), all at once."""
    heads = weights.heads
    query_NHK = weights.query(weights.norm_in(text_ND)).unflatten(-1, (heads, -1))
    query_NHK = query_NHK / math.sqrt(query_NHK.shape[-1])
    weights_MNJ = _head_weights(query_NHK, videos.keys_MHTK, videos.mask_MT)

    double = _wide(text_ND)
    w_MNJ = weights_MNJ.to(double)
    scale_mid_MN = (_quadratic(w_MNJ, videos.gram_mid_MJJ) + weights.norm_mid.eps).rsqrt()
    late_MNJ = _append(w_MNJ * scale_mid_MN.unsqueeze(-1), 1.0)
    scale_MN = (_quadratic(late_MNJ, videos.gram_late_MJJ) + weights.norm_out.eps).rsqrt()
    last_MNJ = _append(late_MNJ * scale_MN.unsqueeze(-1), 1.0)
    norm_MN = _quadratic(last_MNJ, videos.gram_last_MJJ).clamp_min(_TINY**2).sqrt()

    text_ND = F.normalize(text_ND, dim=-1)
    along_MNJ = torch.einsum("nd,mjd->mnj", text_ND, videos.late_MJD)
    dot_MN = (weights_MNJ * along_MNJ).sum(-1).to(double) * scale_mid_MN + (text_ND @ videos.f_D).to(double)
    dot_MN = dot_MN * scale_MN + (text_ND @ videos.shift_D).to(double)
    return (dot_MN / norm_MN).to(text_ND.dtype).T


def pooler_scores(
    text_ND: Tensor,
    frames_MTD: Tensor,
    weights: PoolerWeights,
    mask_MT: Tensor | None = None,
    *,
    memory: int = MEMORY,
) -> Tensor:
    """Cosine of every text with every video as X-Pool's pooler pools it for that text: (N, M).

    Equal to the written-out form without dropout, to rounding. Blocks of texts and videos keep the
    temporary tensors near `memory` bytes; differentiable, though meant for ranking.
    """
    check_pooling_inputs(text_ND, frames_MTD, mask_MT)
    frames, width = frames_MTD.shape[1:]
    tokens = weights.heads * frames
    per_video = 4 * width * (3 * frames + 3 * tokens) + 24 * (tokens + 2) ** 2

    def block(videos: slice) -> Tensor:
        folded = fold_videos(frames_MTD[videos], weights, None if mask_MT is None else mask_MT[videos])
        return torch.cat([folded_scores(text, folded, weights) for text in text_ND.split(_TEXT_BLOCK)])

    return _in_blocks(block, len(text_ND), len(frames_MTD), per_video, tokens + 2, memory)


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
    text_ND, double = F.normalize(text_ND, dim=-1), _wide(text_ND)

    def block(videos: slice) -> Tensor:
        mask = None if mask_MT is None else mask_MT[videos]
        frames_mTD = frames_MTD[videos]
        if mask is not None:
            frames_mTD = frames_mTD.masked_fill(~mask.unsqueeze(-1), 0)
        frames_mTD = F.normalize(frames_mTD, dim=-1)
        gram_mTT = _gram(frames_mTD)
        rows = []
        for text in text_ND.split(_TEXT_BLOCK):
            along_mNT = torch.einsum("nd,mtd->mnt", text, frames_mTD)
            weights_mNT = _masked(along_mNT / temperature, mask).softmax(-1)
            norm_mN = _quadratic(weights_mNT.to(double), gram_mTT).clamp_min(_TINY**2).sqrt()
            rows.append(((weights_mNT * along_mNT).sum(-1) / norm_mN).to(text.dtype).T)
        return torch.cat(rows)

    return _in_blocks(block, len(text_ND), len(frames_MTD), 4 * width * frames, frames, memory)


def _in_blocks(
    block: Callable[[slice], Tensor], texts: int, videos: int, per_video: int, tokens: int, memory: int
) -> Tensor:
    """Some videos at a time against all texts, so that each video is folded once."""
    per_video += min(texts, _TEXT_BLOCK) * tokens * 8 * 5  # a handful of float64 (N, J) tensors are alive
    step = max(1, memory // per_video)
    return torch.cat([block(slice(m, m + step)) for m in range(0, max(videos, 1), step)], dim=1)


def frame_weights(
    text_ND: Tensor, frames_MTD: Tensor, weights: PoolerWeights, mask_MT: Tensor | None = None
) -> Tensor:
    """How much each text looks at each frame, averaged over heads: (N, M, T), rows sum to 1."""
    check_pooling_inputs(text_ND, frames_MTD, mask_MT)
    if mask_MT is not None:
        frames_MTD = frames_MTD.masked_fill(~mask_MT.unsqueeze(-1), 0)
    heads = weights.heads
    query_NHK = weights.query(weights.norm_in(text_ND)).unflatten(-1, (heads, -1))
    keys_MHTK = weights.key(weights.norm_in(frames_MTD)).unflatten(-1, (heads, -1)).transpose(1, 2)
    weights_MNJ = _head_weights(query_NHK / math.sqrt(query_NHK.shape[-1]), keys_MHTK, mask_MT)
    return weights_MNJ.unflatten(-1, (heads, -1)).mean(2).transpose(0, 1)


def _head_weights(query_NHK: Tensor, keys_MHTK: Tensor, mask_MT: Tensor | None) -> Tensor:
    """Softmax over the frames of each head: (M, N, H*T)."""
    logits_MNHT = torch.einsum("nhk,mhtk->mnht", query_NHK, keys_MHTK)
    if mask_MT is not None:
        logits_MNHT = logits_MNHT.masked_fill(~mask_MT[:, None, None], -math.inf)
    return logits_MNHT.softmax(-1).flatten(2)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _gram(x_MJD: Tensor) -> Tensor:
    x_MJD = x_MJD.to(_wide(x_MJD))
    return x_MJD @ x_MJD.transpose(1, 2)


def _quadratic(w_MNJ: Tensor, gram_MJJ: Tensor) -> Tensor:
    """w' G w for every text and video: (M, N), never negative."""
    return ((w_MNJ @ gram_MJJ) * w_MNJ).sum(-1).clamp_min(0)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _with(x_MJD: Tensor, *rows_D: Tensor) -> Tensor:
    """The same extra tokens behind those of every video."""
    return torch.cat([x_MJD, *(row.expand(len(x_MJD), 1, -1) for row in rows_D)], dim=1)


def _append(w_MNJ: Tensor, value: float) -> Tensor:
    return F.pad(w_MNJ, (0, 1), value=value)
