"""A check that losses on cosine similarities share. Axis letters: N rows, D width."""

from __future__ import annotations

from torch import Tensor

from moviola.types import UsageError

_TOLERANCE = 0.02  # what bfloat16 leaves of a length of one


def check_unit_rows(*vectors_ND: Tensor, least: int = 1) -> None:
    """Sets of as many rows of one width, of length one, at least `least` of them; else `UsageError`.

    A row that is not a number passes: the loss is then not a number either, and the training loop
    names the step and the rows.
    """
    first = vectors_ND[0]
    if first.ndim != 2 or any(other.shape != first.shape for other in vectors_ND):
        shapes = ", ".join(str(tuple(v.shape)) for v in vectors_ND)
        raise UsageError(f"Expected as many vectors of one width in every set, got {shapes}.")
    if len(first) < least:
        raise UsageError(
            f"This loss compares rows of a batch, so it needs at least {least}, got {len(first)}.",
            hint="Raise the batch size.",
        )
    for vectors in vectors_ND:
        length_N = vectors.detach().float().norm(dim=-1)
        wrong_N = (length_N - 1).abs() > _TOLERANCE
        if bool(wrong_N.any()):
            raise UsageError(
                f"Expected vectors of length one, got one of length {float(length_N[wrong_N][0]):.4g}.",
                hint="Normalise them first: torch.nn.functional.normalize(x, dim=-1).",
            )
