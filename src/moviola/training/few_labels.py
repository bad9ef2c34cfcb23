"""How well a clip model learns the actions of `data.order_clips` from few labelled clips: claims' measure.

Clips are seen at half their size.

Axis letters: N clips, T frames, C classes or channels, S pixels of a side.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.data import order_clips as world
from moviola.metrics.classification import topk_accuracy
from moviola.training.brief_rows import fit_rows
from moviola.training.layer_decay import LayerDecay
from moviola.types import Batch, Objective

SIDE = world.SIDE // 2


def small_pixels(clips: world.OrderClips) -> Tensor:
    """frames_NTCSS of `SIDE` pixels, from -1 to 1."""
    return F.avg_pool2d(clips.pixels().flatten(0, 1), 2).unflatten(0, (len(clips), -1))


def unlabelled(seed: int, count: int, *, shuffled: bool = False) -> Tensor:
    """frames_NTCSS of clips that nobody named, half of them of the things and speeds of test clips."""
    parts = (world.order_clips(seed + 1000, count // 2, split=split) for split in ("train", "test"))
    return torch.cat([small_pixels(part.shuffled(seed) if shuffled else part) for part in parts])


def fit_clips(
    model: nn.Module,
    objective: Objective,
    frames_NTCSS: Tensor,
    label_N: Tensor,
    *,
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """Train `model` in place on 32 of the clips a step, drawn with replacement."""

    def batch_of(rows: np.ndarray) -> Batch:
        return {"clip": world.clip_batch(frames_NTCSS[rows]), "label": label_N[rows]}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fit_rows(model, objective, batch_of, len(label_N), steps=steps, batch=32, lr=lr, seed=seed)


def few_label_accuracy(
    model: Any, seed: int, *, labelled: int, steps: int, test: int, lr: float = 1e-3
) -> dict[str, float]:
    """Fine-tune all of a copy on `labelled` clips; percent right on `test` of other things and speeds.

    `model` is what `LayerDecay` takes. Clips are not mixed and all layers learn alike. "Kind" is which pair
    of actions it is, whichever way it goes.
    """
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        objective = LayerDecay(
            model, torch.zeros(len(world.ACTIONS), 1), layer_decay=1.0, drop_path=0.0, mixup=0, cutmix=0
        )
    clips, shown = world.order_clips(seed, labelled), world.order_clips(seed, test, split="test")
    label_N = torch.from_numpy(clips.label_N)
    fit_clips(model, objective, small_pixels(clips), label_N, steps=steps, lr=lr, seed=seed)
    with torch.inference_mode():
        parts = small_pixels(shown).split(100)
        scores_NC = torch.cat([model.classify_video(world.clip_batch(part)) for part in parts])
    kinds_NC = scores_NC.unflatten(1, (-1, 2)).logsumexp(-1)
    return {
        "action, top-1": topk_accuracy(scores_NC, shown.label_N, (1,))["top1"],
        "pair accuracy": world.pair_accuracy(scores_NC, shown.label_N),
        "kind of action, top-1": topk_accuracy(kinds_NC, shown.label_N // 2, (1,))["top1"],
    }
