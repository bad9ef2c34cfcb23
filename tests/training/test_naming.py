from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.training.naming import Naming
from moviola.types import PairObjective, UsageError


def small():
    torch.manual_seed(0)
    vision = VitConfig(16, 8, width=16, layers=1, heads=2)
    return CLIP(ClipConfig(16, vision, TextConfig(6, 32, width=16, layers=1, heads=2)))


TOKENS = torch.tensor([[[1, 2, 31], [1, 3, 31]], [[4, 2, 31], [4, 3, 31]]])
BATCH = {"image": torch.randn(3, 3, 16, 16), "label": torch.tensor([0, 1, 1])}


def test_is_the_cross_entropy_over_the_texts_of_one_form():
    model = small()
    objective = Naming(tokens_FCL=TOKENS)
    assert isinstance(objective, PairObjective)
    image = F.normalize(model.encode_image(BATCH["image"]), dim=-1)
    wanted = []
    for form in TOKENS:
        text = F.normalize(model.encode_text(form), dim=-1)
        wanted.append(F.cross_entropy(model.logit_scale.exp() * image @ text.T, BATCH["label"]).item())
    seen = {round(objective(model, BATCH)["cross-entropy"].item(), 5) for _ in range(20)}
    assert seen == {round(value, 5) for value in wanted}


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_that_are_no_class(label):
    with pytest.raises(UsageError, match="from 0 to 1"):
        Naming(tokens_FCL=TOKENS)(small(), {**BATCH, "label": torch.tensor([0, 1, label])})
