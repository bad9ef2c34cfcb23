"""A contrastive loss of two views of the same pictures. Axis letters: B pictures, N vectors, E width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moviola.training.nce import log_sum_exp
from moviola.types import UsageError


def sim_clr(a_BE: Tensor, b_BE: Tensor, temperature: float = 0.1) -> Tensor:
    """SimCLR's loss (Chen et al. 2020, arXiv 2002.05709): each of the 2B vectors picks its other view.

    Cosines over `temperature`, among all vectors but the one itself; the mean over the 2B. The vectors need
    not have length one. Raises `UsageError` for fewer than two pictures, which have no negatives.
    """
    if len(a_BE) < 2 or a_BE.shape != b_BE.shape:
        raise UsageError(
            "SimCLR compares two views of a picture with those of others, so it needs a batch of at least 2, "
            f"got {tuple(a_BE.shape)} and {tuple(b_BE.shape)}.",
            hint="Raise the batch size.",
        )
    both_NE = F.normalize(torch.cat([a_BE, b_BE]).float(), dim=-1)
    others_N, _ = log_sum_exp(both_NE, both_NE, 1 / temperature, leave_out=True)
    own_N = (both_NE * both_NE.roll(len(a_BE), 0)).sum(-1) / temperature
    return (others_N - own_N).mean()
