from __future__ import annotations

import pytest
import torch

from moviola.data.order_clips import clip_batch
from moviola.systems.video.tiktok_videomae import VideoMae, tiny
from moviola.training.layer_decay import LayerDecay
from moviola.types import UsageError


def model_of():
    torch.manual_seed(0)
    return VideoMae(tiny()).eval()


def test_fine_tuning_learns_slower_below():
    model = model_of()
    objective = LayerDecay(model, torch.zeros(3, 1), layer_decay=0.5, drop_path=0.2, head_dropout=0.3)
    assert model.config.classes == 3
    assert [block.rate for block in model.encoder.blocks] == [0, 0.2]
    assert model.head_dropout == 0.3
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {names[id(p)]: g["lr_scale"] for g in objective.param_groups(model) for p in g["params"]}
    assert set(scale) == set(names.values())
    assert scale["encoder.patch_embed.proj.weight"] == 0.125
    assert scale["encoder.blocks.0.attn.qkv.weight"] == 0.25
    assert scale["encoder.blocks.1.norm2.bias"] == 0.5
    assert scale["head.weight"] == scale["fc_norm.weight"] == 1
    loss = objective(
        model, {"clip": clip_batch(torch.randn(4, 8, 3, 16, 16)), "label": torch.tensor([0, 1, 2, 0])}
    )["class"]
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "options", [{"layer_decay": 0.0}, {"layer_decay": 1.1}, {"head_dropout": 1.0}, {"drop_path": 1.0}]
)
def test_bad_input(options):
    model = model_of()
    with pytest.raises(UsageError, match=next(iter(options))):
        LayerDecay(model, torch.zeros(2, 1), **options)
    assert model.config.classes == 0  # nothing was changed
