from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.parts import stan
from moviola.parts.stan import MugStanConfig, SpaceLayer, Stan, TimeLayer, mean_of_real
from moviola.types import UsageError

CLIP = ClipConfig(16, VitConfig(16, 8, 16, 3, 2), TextConfig(8, 32, 16, 1, 2))
CONFIG = MugStanConfig.over(CLIP, depth=2, frames=3, most_frames=6)


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_new_time_layer_changes_nothing_and_a_trained_one_mixes_places_alone():
    torch.manual_seed(0)
    layer, patches = TimeLayer(16, 2, 0.0), draw(2, 4, 5, 16)
    assert torch.equal(layer(patches), patches)
    nn.init.normal_(layer.temporal_fc.weight)
    other = patches.clone()
    other[0, 3, 2] = draw(16, seed=2)
    moved = (layer(other) - layer(patches)).abs().amax(-1) > 1e-6
    assert moved[0, :, 2].all()
    moved[0, :, 2] = False
    assert not moved.any()


def test_a_space_layer_mixes_frames_through_the_class_token_alone():
    torch.manual_seed(0)
    layer, cls, patches = SpaceLayer(16, 2, 4.0, "quick_gelu", 0.0), draw(2, 16), draw(2, 3, 4, 16)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    other = patches.clone()
    other[0, 1] = draw(4, 16, seed=2)
    other[0, 2] = draw(4, 16, seed=3)  # masked: it must not reach the class token
    (cls_a, a), (cls_b, b) = (layer(cls, x, mask) for x in (patches, other))
    torch.testing.assert_close(a[0, 0], b[0, 0])
    assert (cls_a[0] - cls_b[0]).abs().max() > 1e-4
    unseen = layer(cls, torch.where(mask[..., None, None], patches, 9.0), mask)[0]
    torch.testing.assert_close(unseen, cls_a)
    torch.testing.assert_close(layer(cls, patches, mask, class_only=True)[0], cls_a, rtol=1e-5, atol=1e-5)


def test_the_mean_of_real_frames():
    x, mask = draw(2, 3, 4), torch.tensor([[True, False, True], [False, True, False]])
    torch.testing.assert_close(mean_of_real(x, mask), torch.stack([x[0, [0, 2]].mean(0), x[1, 1]]))
    torch.testing.assert_close(mean_of_real(x), x.mean(1))


def test_whole_rows_are_dropped_while_training_only():
    torch.manual_seed(0)
    x = torch.ones(400, 2, 3)
    assert torch.equal(stan.drop_path(x, 0.25, False), x)
    rows = stan.drop_path(x, 0.25, True).flatten(1)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert rows.unique().tolist() == pytest.approx([0, 4 / 3])
    assert 0.15 < (rows[:, 0] == 0).float().mean() < 0.35
    assert [layer.rate for layer in Stan(replace(CONFIG, depth=3)).time] == pytest.approx([0, 0.05, 0.1])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"depth": 4}, "1 to the image tower's 3 layers, got 4"),
        ({"depth": 0}, "depth is from 1"),
        ({"frames": 7}, "frames is from 1 to 6"),
        ({"temperature": 0.0}, "must be positive"),
    ],
)
def test_configurations_that_cannot_be_meant_are_refused(change, match):
    with pytest.raises(UsageError, match=match):
        replace(CONFIG, **change)
