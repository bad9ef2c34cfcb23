from __future__ import annotations

import torch
import torch.nn.functional as F

from moviola.data import cue_conflict as world
from moviola.training.brief import fit
from moviola.training.fine_tuning import FineTuning
from moviola.types import PairObjective


def started():
    model = world.small_clip(0).eval()
    with torch.no_grad():
        text_CD = F.normalize(model.encode_text(world.made_prompts()), dim=-1)
    return model, FineTuning(model, text_CD), text_CD


def test_starts_as_the_zero_shot_classifier():
    model, objective, text_CD = started()
    image = world.made_cues(0, 12, agree=0.5).images_NCSS
    with torch.no_grad():
        wanted = model.score(text_CD, F.normalize(model.encode_image(image), dim=-1)).T
        torch.testing.assert_close(objective.logits(model, image), wanted)
    assert isinstance(objective, PairObjective)


def test_the_loss_is_cross_entropy_and_trains_picture_tower_and_head():
    model, objective, text_CD = started()
    made = world.made_cues(0, 12, agree=0.5)
    batch = {"image": made.images_NCSS, "label": torch.from_numpy(made.shape_N)}
    losses = objective(model, batch)
    plain = -objective.logits(model, batch["image"]).log_softmax(-1)[torch.arange(12), batch["label"]].mean()
    torch.testing.assert_close(losses["labels"], plain)
    losses["labels"].backward()
    assert objective.head_CD.grad.abs().max() > 0
    assert all(p.grad is not None for p in model.visual.parameters())
    assert all(p.grad is None for p in model.transformer.parameters())
    assert model.logit_scale.grad is None
    assert torch.equal(objective.head_CD, text_CD)


def test_learns_its_labels():
    model, objective, _ = started()
    made = world.made_cues(0, 64, agree=1.0)
    data = {"image": made.images_NCSS, "label": torch.from_numpy(made.shape_N)}
    fit(model, objective, data, steps=40, batch=64, lr=3e-3, seed=0)
    with torch.no_grad():
        right = objective.logits(model, data["image"]).argmax(1) == data["label"]
    assert right.double().mean() > 0.9
