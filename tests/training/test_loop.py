import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.data.hashing import hash_uniform
from moviola.training.augment import random_resized_crop
from moviola.training.loop import NotFinite, RowOrder, TrainConfig, train
from moviola.training.objectives import Contrastive, decay_groups, multi_positive_loss
from moviola.training.schedule import warmup_cosine
from moviola.types import Objective, PairObjective, UsageError

TINY = ClipConfig(
    embed_dim=16,
    vision=VitConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, stem=((8, 1),)),
    text=TextConfig(context_length=8, vocab_size=40, width=16, layers=1, heads=2),
    activation="gelu",
)


class Pairs:
    """Rows whose picture's brightness goes with their token; augmented by a hash of (seed, row)."""

    def __init__(self, count=40, broken=None):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def batch(self, rows, *, seed, epoch, step):
        shade = torch.from_numpy(rows % 8 / 8.0).float()
        noise = torch.from_numpy(hash_uniform(seed + epoch, rows)).float()
        image = (shade + 0.01 * noise).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
        if self.broken in rows.tolist():
            image = image * float("nan")
        start = torch.full((8, 1), 38)
        text = torch.cat([start, torch.arange(8).view(-1, 1), start + 1], 1)
        positives = torch.from_numpy(rows[:, None] % 8 == np.arange(8)[None])
        return {"id": rows, "image": image, "text": text, "positives": positives}


def make():
    torch.manual_seed(0)
    return CLIP(TINY)


CONFIG = TrainConfig(steps=12, batch_size=8, lr=3e-3, warmup=2, save_every=4, log_every=1)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["contrastive"] for line in lines}


def test_objective_keeps_the_protocols():
    assert isinstance(Contrastive(), Objective)
    assert isinstance(Contrastive(), PairObjective)


def test_training_learns_and_beats_chance(tmp_path):
    model = make()
    data = Pairs()
    config = TrainConfig(steps=80, batch_size=8, lr=3e-3, warmup=5, save_every=80)
    train(model, Contrastive(), data, config, tmp_path)
    batch = data.batch(np.arange(40), seed=0, epoch=0, step=0)
    with torch.inference_mode():
        logits = model.score(model.encode_text(batch["text"]), model.encode_image(batch["image"])).T
    accuracy = (logits.argmax(1).numpy() == np.arange(40) % 8).mean()
    assert accuracy > 0.5  # chance is 1/8


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_killed_run_resumes_with_the_same_losses_and_weights(tmp_path, optimizer):
    config = replace(CONFIG, optimizer=optimizer)
    whole, broken = make(), make()
    train(whole, Contrastive(), Pairs(), config, tmp_path / "whole")
    train(broken, Contrastive(), Pairs(), config, tmp_path / "killed", stop_at=6)  # last save at 4
    again = make()
    train(again, Contrastive(), Pairs(), config, tmp_path / "killed")
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sgd_steps_are_plain_momentum(tmp_path):
    """Two steps by hand: v = m v + g, w = w - lr v, with the gradient clipped."""
    config = TrainConfig(steps=2, batch_size=8, lr=0.1, warmup=0, optimizer="sgd", momentum=0.5, lr_floor=1.0)
    model, hand, data = make(), make(), Pairs()
    train(model, Contrastive(weight_decay=0.0), data, config, tmp_path)
    order = RowOrder(len(data), 8, config.seed)
    velocity = [torch.zeros_like(p) for p in hand.parameters()]
    for step in range(2):
        epoch, rows = order(step)
        batch = data.batch(rows, seed=config.seed, epoch=epoch, step=step)
        Contrastive()(hand, batch)["contrastive"].backward()
        nn.utils.clip_grad_norm_(hand.parameters(), 1.0)
        with torch.no_grad():
            for v, p in zip(velocity, hand.parameters(), strict=True):
                v.mul_(0.5).add_(p.grad)
                p.sub_(0.1 * v)
                p.grad = None
    for a, b in zip(model.parameters(), hand.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_before_step_sees_gradients_and_may_change_them(tmp_path):
    """An objective that throws the gradients away leaves the model as it was."""

    class Deaf(Contrastive):
        seen = 0.0

        def before_step(self, model):
            self.seen += sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)

    model, objective = make(), Deaf(weight_decay=0.0)
    train(model, objective, Pairs(), CONFIG, tmp_path)
    assert objective.seen > 0
    for a, b in zip(model.parameters(), make().parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_run_does_nothing_again(tmp_path):
    model = make()
    train(model, Contrastive(), Pairs(), CONFIG, tmp_path)
    before = [p.clone() for p in model.parameters()]
    train(model, Contrastive(), Pairs(), CONFIG, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_resuming_with_another_configuration_is_refused(tmp_path):
    train(make(), Contrastive(), Pairs(), CONFIG, tmp_path, stop_at=4)
    other = TrainConfig(**{**CONFIG.__dict__, "lr": 1e-2})
    with pytest.raises(UsageError, match=r"lr: 0.003 then, 0.01 now"):
        train(make(), Contrastive(), Pairs(), other, tmp_path)


def test_a_partial_checkpoint_is_never_read(tmp_path):
    (tmp_path / "checkpoint.partial").write_bytes(b"half")
    train(make(), Contrastive(), Pairs(), CONFIG, tmp_path, stop_at=4)
    assert not (tmp_path / "checkpoint.partial").exists()


def test_a_nan_stops_the_run_and_names_the_rows(tmp_path):
    with pytest.raises(NotFinite, match=r"at step \d+ \(epoch 0\): contrastive nan.* Rows \["):
        train(make(), Contrastive(), Pairs(broken=3), CONFIG, tmp_path)


def test_fewer_rows_than_a_batch_is_refused(tmp_path):
    with pytest.raises(UsageError, match="5 rows, fewer than one batch of 8"):
        train(make(), Contrastive(), Pairs(5), CONFIG, tmp_path)


@pytest.mark.parametrize("field", ["steps", "batch_size", "lr", "clip_grad"])
def test_config_out_of_range(field):
    with pytest.raises(UsageError, match=field):
        TrainConfig(**{"steps": 10, field: 0})


def test_rows_cover_an_epoch_once():
    order = RowOrder(43, 8, seed=1)
    seen = np.concatenate([order(step)[1] for step in range(5)])
    assert len(set(seen.tolist())) == 40
    assert order(5)[0] == 1


def test_multi_positive_loss_with_identity_is_clip_loss():
    logits = torch.randn(5, 5)
    ours = sum(multi_positive_loss(logits, torch.eye(5, dtype=torch.bool)))
    labels = torch.arange(5)
    plain = nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)
    torch.testing.assert_close(ours, plain)


def test_multi_positive_loss_by_hand_and_with_texts_of_no_picture():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 3.0]])
    positive = torch.tensor([[True, True, False], [False, True, False]])
    rows = torch.log_softmax(logits, 1)
    columns = torch.log_softmax(logits.T, 1)
    image = -((rows[0, 0] + rows[0, 1]) / 2 + rows[1, 1]) / 2
    text = -(columns[0, 0] + (columns[1, 0] + columns[1, 1]) / 2) / 2  # the third text fits nothing
    got = multi_positive_loss(logits, positive)
    torch.testing.assert_close(got[0], image)
    torch.testing.assert_close(got[1], text)


def test_vectors_and_position_tables_do_not_decay():
    model = make()
    decayed, plain = decay_groups(model, 0.1)
    ids = {id(p) for p in plain["params"]}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or "positional_embedding" in name
        assert (id(parameter) in ids) == exempt
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_logit_scale_is_clamped(tmp_path):
    model = make()
    objective = Contrastive(max_logit_scale=50)
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    objective.after_step(model)
    assert model.logit_scale.item() == pytest.approx(math.log(50))


def test_a_crop_does_not_depend_on_the_batch():
    images = torch.rand(6, 3, 20, 20)
    ids = np.arange(6)
    whole = random_resized_crop(images, ids, seed=4, size=16)
    part = random_resized_crop(images[[4, 1]], ids[[4, 1]], seed=4, size=16)
    torch.testing.assert_close(whole[[4, 1]], part)
    assert not torch.equal(whole, random_resized_crop(images, ids, seed=5, size=16))


def test_a_whole_crop_without_flip_is_the_picture():
    images = torch.rand(2, 3, 16, 16)
    same = random_resized_crop(
        images, np.arange(2), seed=0, size=16, area=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0
    )
    torch.testing.assert_close(same, images, atol=1e-5, rtol=0)
    mirrored = random_resized_crop(
        images, np.arange(2), seed=0, size=16, area=(1.0, 1.0), aspect=(1.0, 1.0), flip=1.0
    )
    torch.testing.assert_close(mirrored, images.flip(-1), atol=1e-5, rtol=0)


def test_schedule():
    assert warmup_cosine(0, steps=100, warmup=10) == pytest.approx(0.1)
    assert warmup_cosine(10, steps=100, warmup=10) == pytest.approx(1.0)
    assert warmup_cosine(100, steps=100, warmup=10, floor=0.25) == pytest.approx(0.25)


@pytest.mark.parametrize("keep", [False, True])
def test_batch_norm_keeps_its_statistics_where_asked(tmp_path, keep):
    model, data = make(), Pairs()
    names = [name for name in model.state_dict() if "running" in name]
    before = {name: model.state_dict()[name].clone() for name in names}
    config = replace(CONFIG, keep_statistics=keep)
    train(model, Contrastive(), data, config, tmp_path, evaluate=lambda model, step: {}, evaluate_every=2)
    assert names
    assert all(torch.equal(before[name], model.state_dict()[name]) is keep for name in names)


def test_a_run_from_before_a_field_existed_resumes_with_its_default(tmp_path):
    train(make(), Contrastive(), Pairs(), CONFIG, tmp_path, stop_at=4)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["config"] = json.dumps({k: v for k, v in json.loads(state["config"]).items() if k != "optimizer"})
    torch.save(state, path)
    train(make(), Contrastive(), Pairs(), CONFIG, tmp_path, stop_at=8)
    with pytest.raises(UsageError, match="optimizer: adamw then, sgd now"):
        train(make(), Contrastive(), Pairs(), replace(CONFIG, optimizer="sgd"), tmp_path)
