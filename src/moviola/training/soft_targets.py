"""Learning from a teacher's similarities: cross-entropy towards its softmax, in bands of rows.

The target of cell (i, j) does not depend on the student, so its pull on the student's vectors is two
products of the size of the vectors. These are made once, a band of rows at a time; with the student's
log sum exp from `nce` they give value and gradients, and no N x N matrix is ever whole.

Axis letters: N pictures and as many texts, D the student's width, S the teachers' widths together,
C rows of a band.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moviola.training.nce import CHUNK, check_pairs, log_sum_exp
from moviola.types import UsageError


def soft_cross_entropy(
    image_ND: Tensor,
    text_ND: Tensor,
    scale: Tensor | float,
    teacher_image_NS: Tensor,
    teacher_text_NS: Tensor,
    *,
    teacher_scale: float = 100.0,
    teacher_dims: Sequence[int] | None = None,
    average_after_softmax: bool = True,
    chunk: int = CHUNK,
) -> Tensor:
    """The mean over both directions of -sum_j p_ij log q_ij, averaged over the rows.

    q is the student's softmax of scale * image . text; p the teachers' at `teacher_scale`. `teacher_dims`
    are the widths of the teachers whose vectors are joined in S (None: one teacher). With
    `average_after_softmax` p is the mean of each teacher's softmax, else one softmax of the joined dot
    product. Gradients reach images, texts and scale, never the teachers.
    """
    check_pairs(image_ND, text_ND)
    members = _split(teacher_image_NS, teacher_text_NS, len(image_ND), teacher_dims, average_after_softmax)
    rows_N, columns_N = log_sum_exp(image_ND, text_ND, scale, chunk=chunk)
    pulled = _Pull.apply(image_ND, text_ND, members, teacher_scale, chunk)
    return (rows_N.sum() + columns_N.sum() - scale * pulled) / (2 * len(image_ND))


def _split(
    image_NS: Tensor, text_NS: Tensor, count: int, dims: Sequence[int] | None, apart: bool
) -> list[tuple[Tensor, Tensor]]:
    """The teachers' vectors, one pair of tensors a softmax, in float32 at least."""
    if image_NS.shape != text_NS.shape or image_NS.ndim != 2 or len(image_NS) != count:
        raise UsageError(
            f"Expected the teachers' vectors of {count} pictures and texts, got {tuple(image_NS.shape)} and "
            f"{tuple(text_NS.shape)}."
        )
    width = image_NS.shape[1]
    widths = [width] if dims is None else list(dims)
    if sum(widths) != width or min(widths) < 1:
        raise UsageError(
            f"teacher_dims {tuple(widths)} sum to {sum(widths)}, but the teachers' vectors have {width}.",
            hint="Give the width of each teacher, in the order in which they were stored.",
        )
    image_NS, text_NS = (
        x.detach() if x.dtype == torch.float64 else x.detach().float() for x in (image_NS, text_NS)
    )
    _check_lengths(image_NS, widths)
    _check_lengths(text_NS, widths)
    if not apart:
        return [(image_NS, text_NS)]
    return list(zip(image_NS.split(widths, 1), text_NS.split(widths, 1), strict=True))


def _check_lengths(vectors_NS: Tensor, widths: list[int]) -> None:
    """Each teacher's vectors have length one, or the widths given are not those of the stored ones."""
    lengths = torch.stack([part.norm(dim=1) for part in vectors_NS.split(widths, 1)])
    if not bool(((lengths - 1).abs() < 0.05).all()):
        raise UsageError(
            f"With teacher_dims {tuple(widths)} the stored vectors have lengths from {lengths.min():.2f} to "
            f"{lengths.max():.2f}; each teacher's must be 1.",
            hint="Give the width of each teacher, in the order in which they were stored.",
        )


def widths_of(given: Sequence[int] | int | str | None) -> tuple[int, ...] | None:
    """Numbers, one number or text such as "768,768" as widths; None stays None."""
    if given is None:
        return None
    parts: list[Any] = [given] if isinstance(given, int) else list(given)
    if isinstance(given, str):
        parts = given.replace(",", " ").split()
    if not parts or not all(str(part).isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"teacher_dims must be widths such as 768,768, got {given!r}.")
    return tuple(int(part) for part in parts)


def _bands(image_NS: Tensor, text_NS: Tensor, scale: float, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Teachers' logits, some rows at a time."""
    for start in range(0, len(image_NS), chunk):
        part = slice(start, start + chunk)
        with torch.autocast(image_NS.device.type, enabled=False):
            yield part, scale * (image_NS[part] @ text_NS.T)


class _Pull(torch.autograd.Function):
    """sum_ij (p_ij + r_ij) a_i . b_j, with p the targets along rows and r those along columns."""

    @staticmethod
    def forward(
        ctx: Any,
        a_ND: Tensor,
        b_ND: Tensor,
        members: list[tuple[Tensor, Tensor]],
        teacher_scale: float,
        chunk: int,
    ) -> Tensor:
        pull_a, pull_b = torch.zeros_like(a_ND), torch.zeros_like(b_ND)
        for image_NK, text_NK in members:
            columns_N = image_NK.new_full((len(text_NK),), -torch.inf)
            for _, logits_CN in _bands(image_NK, text_NK, teacher_scale, chunk):
                columns_N = torch.logaddexp(columns_N, logits_CN.logsumexp(0))
            for part, logits_CN in _bands(image_NK, text_NK, teacher_scale, chunk):
                target_CN = logits_CN.softmax(1).add_((logits_CN - columns_N).exp_()) / len(members)
                target_CN = target_CN.to(a_ND.dtype)
                with torch.autocast(a_ND.device.type, enabled=False):
                    pull_a[part] += target_CN @ b_ND
                    pull_b += target_CN.T @ a_ND[part]
        ctx.save_for_backward(pull_a, pull_b)
        return (pull_a * a_ND).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        pull_a, pull_b = ctx.saved_tensors
        (grad,) = grads
        return grad * pull_a, grad * pull_b, None, None, None
