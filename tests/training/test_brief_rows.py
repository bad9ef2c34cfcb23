from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from moviola.training.brief_rows import fit_rows


class Line(nn.Module):
    """Two numbers that should become 3 and -2, the second ten times as fast."""

    def __init__(self):
        super().__init__()
        self.slow, self.fast = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))


class Square:
    def forward(self, model, batch):
        return {
            "slow": ((model.slow - 3) ** 2 * batch).mean(),
            "fast": ((model.fast + 2) ** 2 * batch).mean(),
        }

    def param_groups(self, model):
        return [{"params": [model.slow], "lr_scale": 0.1}, {"params": [model.fast]}]

    def lr_factors(self, step, steps):
        self.told = step, steps

    def after_step(self, model):
        self.steps = getattr(self, "steps", 0) + 1


def fitted(steps, **options):
    model, objective, drawn = Line(), Square(), []

    def batch(rows):
        drawn.append(rows)
        return torch.from_numpy(rows).float() * 0 + 1

    fit_rows(model, objective, batch, 7, steps=steps, batch=5, lr=0.05, seed=1, **options)
    assert objective.steps == steps
    assert not model.training
    model.requires_grad_(False)
    return model, np.stack(drawn)


def test_groups_learn_at_their_own_rates():
    model, _ = fitted(20)
    assert float(model.slow) == pytest.approx(-0.1 * float(model.fast), rel=0.1)
    assert -1.0 < float(model.fast) < -0.4
    assert float(fitted(400)[0].fast) == pytest.approx(-2, abs=0.05)


def test_rows_are_drawn_by_the_seed():
    (_, first), (_, again) = fitted(30), fitted(30)
    assert np.array_equal(first, again)
    assert set(first.ravel().tolist()) == set(range(7))


def test_gradients_are_clipped(monkeypatch):
    seen = []
    true = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda p, most: seen.append(most) or true(p, most))
    fitted(3, clip_grad=0.5)
    assert seen == [0.5] * 3
