"""The frozen base inside an adapted model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.parts.adapted import Adapted
from moviola.parts.linear_head import HeadConfig, WithHead
from moviola.training.checkpoint import resume, save
from moviola.training.config import TrainConfig
from moviola.training.objectives import BasePairObjective
from moviola.types import CheckpointError, ClipBatch, Encoder


def tiny():
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2)
    text = TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2)
    torch.manual_seed(0)
    return CLIP(ClipConfig(16, vision, text))


class Shifted(Adapted):
    """Adds a learned vector to the picture's."""

    adaptation = "embedding"

    def __init__(self, base):
        super().__init__(base)
        self.shift = nn.Parameter(torch.ones(16))

    def encode_image(self, pixels_BCHW):
        return super().encode_image(pixels_BCHW) + self.shift


def test_it_is_an_encoder_that_asks_its_base():
    clip = tiny()
    made = Shifted(clip)
    assert isinstance(made, Encoder)
    assert (made.dim, made.context_length, made.has_text, made.separable) == (16, 8, True, True)
    assert made.frame_spec == clip.frame_spec
    assert made.logit_scale is clip.logit_scale
    tokens = torch.tensor([[1, 2, 31, 0]])
    assert torch.equal(made.encode_text(tokens), clip.encode_text(tokens))
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(made.encode_image(pixels), clip.encode_image(pixels) + 1)


def test_only_what_is_added_trains_and_the_base_stays_in_eval_mode():
    made = Shifted(tiny()).train()
    assert made.training
    assert not made.base.training
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["shift"]
    made.encode_image(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(p.grad is None for p in made.base.parameters())


def test_its_own_weights_alone_are_kept():
    made, other = Shifted(tiny()), Shifted(tiny())
    nn.init.normal_(made.shift)
    assert set(made.own_state()) == {"shift"}
    other.load_own(made.own_state(), source="x")
    assert torch.equal(other.shift, made.shift)
    with pytest.raises(CheckpointError, match="1 missing: shift"):
        other.load_own({}, source="x")
    with pytest.raises(CheckpointError, match="1 unexpected: scale"):
        other.load_own({**made.own_state(), "scale": torch.ones(1)}, source="x")
    with pytest.raises(CheckpointError, match="other shape"):
        other.load_own({"shift": torch.ones(3)}, source="x")


def test_checkpoints_hold_no_base(tmp_path):
    made, other, objective = Shifted(tiny()), Shifted(tiny()), BasePairObjective()
    nn.init.normal_(made.shift)
    config = TrainConfig(steps=2, optimizer="sgd")
    optimizer = torch.optim.SGD([made.shift], lr=0.1, momentum=0.9)
    save(tmp_path / "c.pt", made, objective, optimizer, config, 1, {})
    assert (tmp_path / "c.pt").stat().st_size < 10_000
    optimizer = torch.optim.SGD([other.shift], lr=0.1, momentum=0.9)
    assert resume(tmp_path / "c.pt", other, objective, optimizer, config, {}) == 1
    assert torch.equal(other.shift, made.shift)


def test_a_video_is_classified_by_its_own_vector_or_by_its_frames():
    clip = tiny().eval()
    head = WithHead(clip, HeadConfig(classes=3))
    nn.init.normal_(head.get_buffer("weight_DC"))
    frames = torch.randn(2, 4, 3, 16, 16)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    batch = ClipBatch(frames, torch.zeros(2, 4), mask)
    whole = head.classify_vectors(clip.encode_video(batch))
    assert torch.allclose(head.classify_video(batch), whole)
    by_frame = Adapted.classify_video(head, batch)
    second = torch.stack([head.classify_image(frames[1, t : t + 1])[0] for t in range(2)]).mean(0)
    assert torch.allclose(by_frame[1], second, atol=1e-5)
    with pytest.raises(NotImplementedError, match="no classifier"):
        Shifted(clip).classify_image(frames[:, 0])
