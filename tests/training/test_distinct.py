from __future__ import annotations

import pytest
import torch

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.training.distinct import Distinct
from moviola.training.objectives import Contrastive


@pytest.fixture(scope="module")
def model() -> CLIP:
    torch.manual_seed(0)
    text = TextConfig(8, 32, width=16, layers=1, heads=2)
    return CLIP(ClipConfig(16, VitConfig(16, 8, 16, 1, 2), text))


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 30, (count, 8), generator=generator)
    tokens[:, -1] = 31
    return {"image": torch.randn(count, 3, 16, 16, generator=generator), "text": tokens}


def test_without_repeats_it_is_clips_loss(model: CLIP) -> None:
    ours, plain = (sum(objective(model, batch()).values()) for objective in (Distinct(), Contrastive()))
    torch.testing.assert_close(ours, plain)


def test_equal_captions_are_one_text(model: CLIP) -> None:
    """Its pictures share it as a target, and it is encoded once."""
    given = batch()
    given["text"][4] = given["text"][1]
    outputs = Distinct().outputs(model, given)
    assert outputs["text"].shape == (5, 16)
    positives = outputs["positives"]
    assert positives.sum(1).tolist() == [1] * 6
    assert sorted(positives.sum(0).tolist()) == [1, 1, 1, 1, 2]
    assert torch.equal(positives[1], positives[4])
    logits = outputs["logit_scale"].exp() * outputs["image"] @ outputs["text"].T
    of_pictures = -(logits.log_softmax(1) * positives).sum(1).mean()
    target = positives.float() / positives.sum(0)
    of_texts = -(logits.log_softmax(0) * target).sum(0).mean()
    (loss,) = Distinct()(model, given).values()
    torch.testing.assert_close(loss, (of_pictures + of_texts) / 2)
