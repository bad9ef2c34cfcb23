"""The baselines of VR-LwF, each against its own definition. Their shared parts are in tests/systems too."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.training.config import TrainConfig
from moviola.training.continual import FineTune, Lwf, Task, Words, image_vectors, text_vectors
from moviola.training.continual_baselines import (
    AGem,
    GeoDl,
    Imm,
    Rkr,
    geodesic_distance,
    geodesic_flow_kernel,
    project,
    subspace,
)
from moviola.training.loop import train
from moviola.types import Objective, Refusal, UsageError

CONFIG = ClipConfig(
    16,
    VitConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
    TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2),
)
METHODS = {"fine-tune": FineTune, "lwf": Lwf, "imm": Imm, "geodl": GeoDl, "a-gem": AGem, "rkr": Rkr}


def clip(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(CONFIG).eval()


def names(templates=1):
    tokens = torch.randint(2, 30, (6, templates, 8), generator=torch.Generator().manual_seed(2))
    tokens[:, :, 4] = 31
    tokens[:, :, 5:] = 0
    return tokens


def task(index=1, current=(3, 4, 5), earlier=None, templates=1):
    seen = tuple(range(max(current) + 1))
    return Task(index, current, seen, names(templates), Words(32, 30, 31), 0, earlier)


def batch(labels=(3, 4, 5, 4, 3, 5), seed=0):
    pixels = torch.randn(len(labels), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"image": pixels, "label": torch.tensor(labels)}


class Pictures:
    """Training data of one batch, over and over."""

    def __init__(self, labels=(3, 4, 5, 4, 3, 5)):
        self.made = batch(labels)

    def __len__(self):
        return len(self.made["label"])

    def batch(self, rows, *, seed, epoch, step):
        return {
            "id": [str(row) for row in rows],
            "row": torch.from_numpy(np.asarray(rows)),
            **{name: tensor[torch.from_numpy(np.asarray(rows))] for name, tensor in self.made.items()},
        }


def step(model, objective, shown, lr=1e-2):
    optimizer = torch.optim.SGD(objective.param_groups(model), lr=lr)
    torch.stack(list(objective(model, shown).values())).sum().backward()
    objective.before_step(model)
    optimizer.step()
    optimizer.zero_grad()
    objective.after_step(model)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_an_objective_that_the_loop_trains_and_resumes(name, tmp_path):
    """Killed half-way and made again from the same weights, it ends where an uninterrupted run ends."""
    memory = batch((0, 1, 2))
    now = task(earlier=lambda kept, size, at: {k: t[at % 2 :] for k, t in memory.items()})
    config = TrainConfig(
        steps=6, batch_size=3, lr=1e-2, warmup=0, save_every=2, log_every=1, betas=(0.9, 0.999), eps=1e-8
    )
    ends = []
    for folder, stops in (("whole", (None,)), ("killed", (3, None))):
        for stop in stops:
            model = clip()
            objective = METHODS[name](model, now)
            assert isinstance(objective, Objective)
            with torch.random.fork_rng(devices=[]):
                train(model, objective, Pictures(), config, tmp_path / folder, stop_at=stop)
        objective.finish(model)
        ends.append(model.state_dict())
    assert set(ends[0]) == set(clip().state_dict())
    for key, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][key]), key
    assert any(not torch.equal(tensor, clip().state_dict()[key]) for key, tensor in ends[0].items())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_its_task(name):
    model, shown, now = clip(), batch(), task()
    objective = METHODS[name](model, now)
    first = objective(model, shown)["cross_entropy"].item()
    for _ in range(20):
        step(model, objective, shown, lr=5e-2)
    assert objective(model, shown)["cross_entropy"] < first


@pytest.mark.parametrize("name", METHODS)
def test_statistics_of_batch_norm_stay_those_of_the_pre_training(name):
    """Else student and teacher differ from the first step, and all that was not seen shifts."""
    config = ClipConfig(16, ResNetConfig(image_size=32, width=8, layers=(1, 1, 1, 1), heads=4), CONFIG.text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIP(config)
        with torch.no_grad():
            model.train()
            for _ in range(3):  # statistics unlike those of new layers
                model.encode_image(3 * torch.randn(8, 3, 32, 32) + 1)
    held = {key: t.clone() for key, t in model.state_dict().items() if "running" in key}
    assert held
    model.train()
    objective = METHODS[name](model, task())
    shown = {"image": F.interpolate(batch()["image"], scale_factor=2.0), "label": batch()["label"]}
    losses = objective(model, shown)
    assert all(loss.abs() < 1e-6 for key, loss in losses.items() if key != "cross_entropy")
    step(model, objective, shown)
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in held.items())


def test_several_templates_are_the_mean_of_unit_vectors():
    model, tokens = clip(), names(3)
    made, further = text_vectors(model, tokens, names()[:2, 0])
    each = F.normalize(model.encode_text(tokens.flatten(0, 1)), dim=-1).unflatten(0, (6, 3))
    torch.testing.assert_close(made, F.normalize(each.mean(1), dim=-1))
    torch.testing.assert_close(further, F.normalize(model.encode_text(names()[:2, 0]), dim=-1))
    assert torch.isfinite(Lwf(model, task(templates=3))(model, batch())["lwf"])


def test_lwf_replays_the_names_seen_so_far_in_every_task():
    model, other = clip(), clip(1)
    for now in (task(0, (0, 1, 2)), task(1, (3, 4))):
        shown = batch(now.current)
        ours = Lwf(model, now, other, alpha=0.7, temperature=2.0)
        logits = []
        for tower in (model, other):
            text_SD = text_vectors(tower, now.tokens_CKL[list(now.seen)])[0]
            logits.append(tower.logit_scale.exp() * image_vectors(tower, shown["image"]) @ text_SD.T / 2)
        wanted = 0.7 * F.kl_div(logits[0].log_softmax(1), logits[1].softmax(1), reduction="batchmean")
        torch.testing.assert_close(ours(model, shown)["lwf"], wanted)


# --------------------------------------------------------------------------------------------------
# IMM
# --------------------------------------------------------------------------------------------------


def test_imm_ends_between_the_weights_before_and_after():
    model = clip()
    before = copy.deepcopy(model.state_dict())
    objective = Imm(model, task(), share=0.25)
    step(model, objective, batch())
    after = copy.deepcopy(model.state_dict())
    objective.finish(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * after[name])


# --------------------------------------------------------------------------------------------------
# GeoDL
# --------------------------------------------------------------------------------------------------


def bases(dim=12, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.linalg.qr(torch.randn(dim, size, generator=generator, dtype=torch.float64))[0] for _ in range(2)
    ]


def test_the_kernel_is_the_integral_of_the_projections_along_the_geodesic():
    old, new = bases()
    turn, cosine, other = torch.linalg.svd(old.T @ new)
    angle = torch.acos(cosine)
    along, across = old @ turn, (new @ other.T - old @ turn * cosine) / torch.sin(angle)
    total, count = torch.zeros(12, 12, dtype=torch.float64), 4000
    for at in (torch.arange(count, dtype=torch.float64) + 0.5) / count:  # the midpoint rule
        flow = along * torch.cos(at * angle) + across * torch.sin(at * angle)
        total += flow @ flow.T / count
    torch.testing.assert_close(geodesic_flow_kernel(old, new), total, rtol=0, atol=1e-6)


def test_the_kernel_between_equal_and_between_orthogonal_subspaces():
    old, _ = bases()
    torch.testing.assert_close(geodesic_flow_kernel(old, old), old @ old.T, rtol=0, atol=1e-6)
    whole = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double())[0]
    kernel = geodesic_flow_kernel(whole[:, :2], whole[:, 2:4])
    values = torch.linalg.eigvalsh(kernel)
    # at a right angle: eigenvalues 1/2 +- 1/pi, twice, and 0 outside both
    half = [0.5 - 1 / math.pi] * 2 + [0.5 + 1 / math.pi] * 2
    torch.testing.assert_close(values, torch.tensor([0, 0, *half], dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_distance_is_zero_where_nothing_moved_and_finite_everywhere():
    rows = F.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    new = rows.clone().requires_grad_()
    loss = geodesic_distance(new, rows)
    loss.backward()
    assert loss == 0
    assert new.grad.abs().max() == 0
    few = rows[:2].clone().requires_grad_()
    assert geodesic_distance(few, rows[2:4]) == 0
    same = torch.ones(5, 16) / 4  # one point: no direction at all
    assert torch.isfinite(geodesic_distance(same, rows[:5]))
    basis = subspace(rows, 4)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4), rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# A-GEM
# --------------------------------------------------------------------------------------------------


def test_a_projected_gradient_no_longer_harms_the_memory():
    reference = [torch.tensor([1.0, 0.0]), torch.tensor([[2.0]])]
    harmful = [torch.tensor([-3.0, 1.0]), torch.tensor([[0.5]])]
    project(harmful, reference)
    assert sum((g * r).sum() for g, r in zip(harmful, reference, strict=True)) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(harmful[0], torch.tensor([-3.0 + 2 / 5, 1.0]))
    harmless = [torch.tensor([3.0, 1.0]), torch.tensor([[0.5]])]
    project(harmless, reference)
    torch.testing.assert_close(harmless[0], torch.tensor([3.0, 1.0]))


def test_a_gem_takes_out_what_points_against_earlier_pictures():
    model, memory, asked = clip(), batch((0,) * 6, seed=1), []

    def earlier(kept, size, at):
        asked.append((kept, size, at))
        return memory

    # one name cannot win and lose: pictures of class 3 pull against those of class 0, others hardly
    now = Task(1, (0, 3), (0, 3), names(), earlier=earlier)
    objective = AGem(model, now, memory=7, memory_batch=5)
    projected = 0
    for seed in range(8):
        objective(model, batch((3 * (seed % 2),) * 6, seed))["cross_entropy"].backward()
        given = {name: p.grad.clone() for name, p in model.named_parameters()}
        objective.before_step(model)
        found = {name: p.grad for name, p in model.named_parameters()}
        reference = dict(
            zip(
                found,
                torch.autograd.grad(objective.remembered(model, memory), list(model.parameters())),
                strict=True,
            )
        )
        before, after = (sum((g[n] * reference[n]).sum() for n in g) for g in (given, found))
        if before < 0:
            projected += 1
            assert abs(after) < 1e-4 * abs(before) + 1e-6
        else:
            assert all(torch.equal(found[name], given[name]) for name in given)
        model.zero_grad()
        objective.after_step(model)
    assert 0 < projected < 8
    assert asked == [(7, 5, at) for at in range(8)]


def test_a_gem_without_earlier_tasks_is_fine_tuning():
    plain, other = clip(), clip()
    step(plain, FineTune(plain, task(0, (0, 1, 2))), batch((0, 1, 2)))
    step(other, AGem(other, task(0, (0, 1, 2))), batch((0, 1, 2)))
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in plain.state_dict().items())


# --------------------------------------------------------------------------------------------------
# RKR
# --------------------------------------------------------------------------------------------------


def test_rkr_starts_as_the_model_trains_little_and_is_merged_exactly():
    model, shown = clip(), batch()
    before = copy.deepcopy(model)
    objective = Rkr(model, task(), rank=2)
    torch.testing.assert_close(model.encode_image(shown["image"]), before.encode_image(shown["image"]))
    groups = list(objective.param_groups(model))
    trained = sum(p.numel() for p in groups[0]["params"])
    assert trained < 0.2 * sum(p.numel() for p in before.parameters())
    for _ in range(3):
        step(model, objective, shown)
    image, text = model.encode_image(shown["image"]), model.encode_text(names()[:, 0])
    objective.finish(model)
    assert set(model.state_dict()) == set(before.state_dict())
    torch.testing.assert_close(model.encode_image(shown["image"]), image)
    torch.testing.assert_close(model.encode_text(names()[:, 0]), text)
    linear = "transformer.resblocks.0.mlp.c_fc."
    for name, tensor in model.state_dict().items():
        same = torch.equal(tensor, before.state_dict()[name])
        inside = ".resblocks." in f".{name}" and (".mlp." in name or "out_proj" in name)
        assert same or inside, name
    # scale * (W + low rank): what is left after the rows are scaled back has rank 2
    scale = model.state_dict()[linear + "bias"] / before.state_dict()[linear + "bias"]
    change = model.state_dict()[linear + "weight"] / scale[:, None] - before.state_dict()[linear + "weight"]
    assert int((torch.linalg.svdvals(change.double()) > 1e-5).sum()) <= 2
    second = Rkr(model, task(2, (3, 4, 5)))
    step(model, second, shown)
    second.finish(model)
    assert set(model.state_dict()) == set(before.state_dict())


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------

BAD = {
    "share": (lambda: Imm(clip(), task(), share=0.0), "share"),
    "memory": (lambda: AGem(clip(), task(), memory=0), "memory"),
    "rank": (lambda: Rkr(clip(), task(), rank=0), "rank"),
    "alpha": (lambda: GeoDl(clip(), task(), alpha=-1.0), "alpha"),
    "above": (lambda: FineTune(clip(), task(), above=-1), "0 or more"),
    "subspaces": (lambda: geodesic_flow_kernel(torch.eye(4)[:, :2], torch.eye(4)[:, :3]), "one size"),
    "tokens": (lambda: Task(0, (0,), (0,), names()[:, 0]), "classes, templates, length"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, said = BAD[name]
    with pytest.raises(UsageError, match=said):
        call()


def test_a_model_whose_towers_are_not_apart_trains_whole_or_not_at_all():
    model = torch.nn.Module()
    model.logit_scale = torch.nn.Parameter(torch.zeros(()))
    with pytest.raises(Refusal, match="image tower"):
        FineTune(model, task(), part="image")


def test_rkr_needs_linear_layers():
    config = ClipConfig(16, ResNetConfig(image_size=32, width=8, layers=(1, 1, 1, 1), heads=4), CONFIG.text)
    with pytest.raises(UsageError, match="no linear layers"):
        Rkr(CLIP(config), task(), part="image")
