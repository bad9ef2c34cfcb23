"""Weight-space averaging: what a fine-tune learned without all that it forgot (WiSE-FT, arXiv 2109.01903)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moviola.types import UsageError


def interpolate(before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 - share) * before + share * after, name by name; counters come from `after`.

    `UsageError` where names or shapes differ: two architectures have no average.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"The share of the trained weights is between 0 and 1, got {share}.")
    differing = sorted(set(before) ^ set(after))
    differing += [k for k in before if k in after and before[k].shape != after[k].shape]
    if differing:
        raise UsageError(
            f"Only models of one architecture can be averaged; these differ in {', '.join(differing[:5])}."
        )
    made = {}
    for name, value in after.items():
        if value.is_floating_point():
            start = before[name].detach().to(value.device, torch.float32)
            made[name] = torch.lerp(start, value.detach().float(), share).to(value.dtype)
        else:
            made[name] = value.detach().clone()
    return made
