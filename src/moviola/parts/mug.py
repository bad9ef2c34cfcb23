"""Mug: words and frames that find a partner on the other side decide the score of a text and a video.

The mean of a video's frames is spoilt by frames that the text does not speak of. Here every word takes the
frames most like it and every frame the words most like it (softmax of the similarities times `tau`); words
and frames are then weighed by how well they did. There is nothing to learn. From Mug-STAN (Liu et al. 2023,
arXiv 2311.15075), whose official head has two modes:

simple   half of the weighed mean of words' scores plus half of that of frames' scores
full     the dot product of the weighed mean of words and the weighed mean of frames

The full mode is written with vectors of every pair there. It needs none: a word's score with the frames it
took is sum_t a_t S_t, and the last dot product is sum_lt w_l S_lt u_t, all from the similarities S. So both
modes cost the same, and both run over blocks of texts and videos: the N x M x L x T similarities are never
whole, in training neither, and a block is only as long as its longest text. Equal to rounding.

Padding is told by masks, where the official code takes a similarity of exactly 0 for it and has no mask of
frames. In its full mode padded words still take part in the last softmax; `official_padding` restores that.

Axis letters: N texts, M videos, L words of a text, T frames of a video, D width; n, m, l those of a block.
Masks are True where a word or frame is real. Words and frames are raw; they are normalised here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moviola.types import UsageError

TAU = 100.0
NUMBERS = 1 << 20  # similarities of a block
_EPS = 1e-6  # smallest length divided by, as officially


def mug_scores(
    words_NLD: Tensor,
    frames_MTD: Tensor,
    mask_NL: Tensor | None = None,
    mask_MT: Tensor | None = None,
    *,
    tau: float = TAU,
    full: bool = False,
    official_padding: bool = False,
    numbers: int = NUMBERS,
) -> Tensor:
    """scores_NM of texts, each a set of words, and videos, each a set of frames: like cosines, at most 1.

    A text of one vector (L = 1) is compared with the frames it fits: the official mode `mug_frame_text`.
    Raises `UsageError` for shapes that do not fit, a text without a word and a video without a frame.
    """
    if not tau > 0:
        raise UsageError(f"tau must be positive, got {tau}.", hint="The paper uses 100.")
    score = partial(_mutual, tau=tau, full=full, leak=official_padding and full)
    return _in_blocks(
        score, words_NLD, frames_MTD, mask_NL, mask_MT, (), (), numbers=numbers, trim=not official_padding
    )


def best_match_scores(
    words_NLD: Tensor,
    frames_MTD: Tensor,
    word_weight_NL: Tensor,
    frame_weight_MT: Tensor,
    mask_NL: Tensor | None = None,
    mask_MT: Tensor | None = None,
    *,
    official_padding: bool = False,
    numbers: int = NUMBERS,
) -> Tensor:
    """scores_NM: half of each word's best frame plus half of each frame's best word, by the weights given.

    The baseline of Wang et al. 2022 (arXiv 2203.07111), officially `drl_wti`. Weights of a text or a video
    sum to 1 over its real words or frames. A frame unlike all words of a padded text takes the 0 of padding
    for its best word in the official code: `official_padding`.
    """
    weights = (word_weight_NL,), (frame_weight_MT,)
    score = partial(_best, leak=official_padding)
    return _in_blocks(
        score, words_NLD, frames_MTD, mask_NL, mask_MT, *weights, numbers=numbers, trim=not official_padding
    )


def _mutual(
    words_nlD: Tensor,
    mask_nl: Tensor,
    frames_mTD: Tensor,
    mask_mT: Tensor,
    *,
    tau: float,
    full: bool,
    leak: bool,
) -> Tensor:
    """The formula over one block: scores_nm. `word_nlm` and `frame_nmT` are scores of words and frames."""
    sim_nlmT = _similarity(words_nlD, frames_mTD)
    no_word_nl1, no_frame_mT = ~mask_nl.unsqueeze(-1), ~mask_mT
    logits_nlmT = tau * sim_nlmT
    over_frames_nlmT = logits_nlmT.masked_fill(no_frame_mT, -math.inf).softmax(-1)
    over_words_nlmT = logits_nlmT.masked_fill(no_word_nl1.unsqueeze(-1), -math.inf).softmax(1)
    word_nlm = (over_frames_nlmT * sim_nlmT).sum(-1)
    frame_nmT = (over_words_nlmT * sim_nlmT).sum(1)
    if leak:  # a padded word looks at all frames alike, and then counts like any other
        mean_nlm = sim_nlmT.masked_fill(no_frame_mT, 0).sum(-1) / mask_mT.sum(-1)
        word_nlm = torch.where(no_word_nl1, mean_nlm, word_nlm)
        no_word_nl1 = torch.zeros_like(no_word_nl1)
    word_weight_nlm = (tau * word_nlm).masked_fill(no_word_nl1, -math.inf).softmax(1)
    frame_weight_nmT = (tau * frame_nmT).masked_fill(no_frame_mT, -math.inf).softmax(-1)
    if full:
        word_nlm = (sim_nlmT * frame_weight_nmT.unsqueeze(1)).sum(-1)
        return (word_weight_nlm * word_nlm).sum(1)
    return ((word_weight_nlm * word_nlm).sum(1) + (frame_weight_nmT * frame_nmT).sum(-1)) / 2


def _best(
    words_nlD: Tensor,
    mask_nl: Tensor,
    word_weight_nl: Tensor,
    frames_mTD: Tensor,
    mask_mT: Tensor,
    frame_weight_mT: Tensor,
    *,
    leak: bool,
) -> Tensor:
    sim_nlmT = _similarity(words_nlD, frames_mTD)
    word_nlm = sim_nlmT.masked_fill(~mask_mT, -math.inf).amax(-1)
    frame_nmT = sim_nlmT.masked_fill(~mask_nl[..., None, None], 0 if leak else -math.inf).amax(1)
    word_weight_nl = word_weight_nl.masked_fill(~mask_nl, 0)
    frame_weight_mT = frame_weight_mT.masked_fill(~mask_mT, 0)
    by_words_nm = torch.einsum("nlm,nl->nm", word_nlm, word_weight_nl)
    return (by_words_nm + (frame_nmT * frame_weight_mT).sum(-1)) / 2


def _similarity(words_nlD: Tensor, frames_mTD: Tensor) -> Tensor:
    """Dot products sim_nlmT, one product of matrices."""
    sim = words_nlD.flatten(0, 1) @ frames_mTD.flatten(0, 1).T
    return sim.unflatten(1, frames_mTD.shape[:2]).unflatten(0, words_nlD.shape[:2])


def _in_blocks(
    score: Callable[..., Tensor],
    words_NLD: Tensor,
    frames_MTD: Tensor,
    mask_NL: Tensor | None,
    mask_MT: Tensor | None,
    of_words: Sequence[Tensor],
    of_frames: Sequence[Tensor],
    *,
    numbers: int,
    trim: bool,
) -> Tensor:
    """score(words, mask, *of_words, frames, mask, *of_frames) over blocks of at most `numbers` similarities.

    Texts of like length share a block, and columns that hold no word of a block are left out (`trim`). Where
    there is more than one block, the backward pass computes each anew.
    """
    mask_NL, mask_MT = _masks(words_NLD, frames_MTD, mask_NL, mask_MT)
    if trim:  # what lies in padding, NaN included, must not matter
        words_NLD = words_NLD.masked_fill(~mask_NL.unsqueeze(-1), 0)
    frames_MTD = frames_MTD.masked_fill(~mask_MT.unsqueeze(-1), 0)
    texts, videos = (_unit(words_NLD), mask_NL, *of_words), (_unit(frames_MTD), mask_MT, *of_frames)
    order_N = mask_NL.sum(1).argsort()
    room = max(1, numbers // (mask_NL.shape[1] * mask_MT.shape[1]))  # pairs of a text and a video
    step = min(len(frames_MTD), max(1, math.isqrt(room)))
    several = len(frames_MTD) > step or len(order_N) > room // step
    rows = []
    with torch.autocast(words_NLD.device.type, enabled=False):
        for rows_n in order_N.split(max(1, room // step)):
            some = [x[rows_n] for x in texts]
            if trim:
                used_L = some[1].any(0)
                some = [x[:, used_L] for x in some]
            parts = []
            for m in range(0, len(frames_MTD), step):
                block = (*some, *(x[m : m + step] for x in videos))
                again = several and torch.is_grad_enabled()
                parts.append(checkpoint(score, *block, use_reentrant=False) if again else score(*block))
            rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)[order_N.argsort()]


def _unit(x: Tensor) -> Tensor:
    """Rows of length one, in single precision at least: `tau` would magnify the rounding of a shorter one."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=_EPS)


def _masks(
    words_NLD: Tensor, frames_MTD: Tensor, mask_NL: Tensor | None, mask_MT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both masks, made where none is given; `UsageError` for what cannot be scored."""
    if words_NLD.ndim != 3 or frames_MTD.ndim != 3 or words_NLD.shape[2] != frames_MTD.shape[2]:
        raise UsageError(
            "Words (N, L, D) and frames (M, T, D) of one width are compared, got "
            f"{tuple(words_NLD.shape)} and {tuple(frames_MTD.shape)}."
        )
    made = []
    for kind, x, mask in (("text", words_NLD, mask_NL), ("video", frames_MTD, mask_MT)):
        part = {"text": "word", "video": "frame"}[kind]
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
            raise UsageError(
                f"The mask of {part}s must be bool of shape {tuple(x.shape[:2])}, got {mask.dtype} "
                f"{tuple(mask.shape)}."
            )
        if not len(x) or not bool(mask.any(1).all()):
            raise UsageError(
                f"Every {kind} needs a {part}: {int((~mask.any(1)).sum())} of {len(x)} have none."
            )
        made.append(mask)
    return made[0], made[1]
