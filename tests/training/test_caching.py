"""Gradient caching and several processes give the plain loss's losses and gradients."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.training.caching import batch_rows, compute, rows_of
from moviola.training.objectives import BasePairObjective, Contrastive, SigLip
from moviola.types import ClipBatch, Needs, UsageError

pytest.importorskip("accelerate")


def make(objective: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2)
    text = TextConfig(context_length=8, vocab_size=32, width=16, layers=2, heads=2)
    model = CLIP(ClipConfig(12, vision, text))
    return model.train(), objectives()[objective](model).train()


def objectives():
    """The objectives whose gradients must not depend on memory or processes (issue C's list)."""
    made = {"clip": Contrastive, "siglip": SigLip, "head": Head}
    from moviola.systems.registry import all_systems, entry_module

    for system in all_systems():
        training = getattr(entry_module(system), "TRAINING", None)
        if training is not None and system.slug in ("cloob", "alip"):
            made[system.slug] = training.objective
    return made


class Head(BasePairObjective):
    """A loss with parameters, batch statistics and a constant of its own."""

    needs = Needs()

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.head = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12))

    def outputs(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "image": model.encode_image(batch["image"]),
            "text": model.encode_text(batch["text"]),
            "weight": batch["weight"],
            "logit_scale": model.logit_scale,
        }

    def loss(self, model: nn.Module, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        image, text = self.head(outputs["image"]) / 8, outputs["text"]
        scores = outputs["logit_scale"] * image @ text.T
        return {"head": (scores.logsumexp(1) * outputs["weight"]).mean(), "size": image.square().mean()}


def pairs(count: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(1, 30, (count, 8), generator=generator)
    text[:, -1] = 31
    return {
        "image": torch.randn(count, 3, 16, 16, generator=generator),
        "text": text,
        "caption": text.flip(0),
        "weight": torch.rand(count, generator=generator),
        "caption_mask": torch.ones(count, dtype=torch.bool),
        "row": torch.arange(count),
    }


def named(key: str):
    return lambda told: f"{key}: {told}"


def gradients(model: nn.Module, objective: nn.Module) -> dict[str, Tensor]:
    named = {
        **dict(model.named_parameters()),
        **{f"objective.{k}": p for k, p in objective.named_parameters()},
    }
    return {k: p.grad for k, p in named.items() if p.grad is not None}


@pytest.mark.parametrize("name", sorted(objectives()))
@pytest.mark.parametrize("micro_batch", [1, 5, 6])
def test_caching_gives_the_plain_gradients(name, micro_batch):
    plain, cached = make(name), make(name)
    wanted = compute(*plain, pairs())
    got = compute(*cached, pairs(), micro_batch=micro_batch)
    assert set(got) == set(wanted)
    for loss in wanted:
        torch.testing.assert_close(got[loss], wanted[loss], rtol=1e-5, atol=1e-5)
    a, b = gradients(*plain), gradients(*cached)
    assert set(a) == set(b)
    assert len(a) > 40
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-5, atol=1e-5, msg=named(key))
    for key, value in plain[1].state_dict().items():
        torch.testing.assert_close(cached[1].state_dict()[key], value, rtol=1e-5, atol=1e-5)


def test_dropout_is_drawn_alike_in_both_passes():
    """With dropout a cached step is the gradient of one well-defined loss: the same again, bit for bit."""
    model, objective = make("clip")
    model.visual.transformer.resblocks.append(nn.Dropout(0.5))
    compute(model, objective, pairs(), micro_batch=4, seed=9)
    first = {k: v.clone() for k, v in gradients(model, objective).items()}
    for seed, same in ((9, True), (10, False)):
        model.zero_grad()
        compute(model, objective, pairs(), micro_batch=4, seed=seed)
        again = gradients(model, objective)
        assert all(torch.equal(again[k], first[k]) for k in first) is same


def test_running_statistics_move_once():
    model, objective = make("clip")
    norm = nn.BatchNorm2d(3)
    tower = model.visual.forward
    model.visual.norm = norm
    model.visual.forward = lambda pixels: tower(norm(pixels))
    compute(model, objective, pairs(), micro_batch=6)
    assert norm.num_batches_tracked.item() == 2  # two parts
    alone = nn.BatchNorm2d(3)
    for start in (0, 6):
        alone(pairs()["image"][start : start + 6])
    torch.testing.assert_close(norm.running_mean, alone.running_mean)
    assert norm.momentum == 0.1


class TokenLoss(nn.Module):
    """An objective that is not cut in two: its parts are averaged."""

    needs, scope = Needs(), "token"

    def forward(self, model, batch):
        return {"mean": model.encode_image(batch["image"]).square().mean()}

    def param_groups(self, model):
        return [{"params": list(model.parameters())}]

    def lr_factors(self, step, steps):
        return None

    def on_episode(self, model, episode):
        return

    def before_step(self, model):
        pass

    def after_step(self, model):
        return


def test_other_objectives_are_averaged_over_their_parts():
    (a, _), (b, _) = make("clip"), make("clip")
    wanted = compute(a, TokenLoss(), pairs())
    got = compute(b, TokenLoss(), pairs(), micro_batch=5)
    torch.testing.assert_close(got["mean"], wanted["mean"])
    for key, value in gradients(a, nn.Module()).items():
        torch.testing.assert_close(gradients(b, nn.Module())[key], value, rtol=1e-5, atol=1e-5)


def test_cutting_a_batch():
    batch = {
        "id": ["a", "b", "c"],
        "clip": ClipBatch(torch.zeros(3, 2, 3, 4, 4), torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool)),
        "text": torch.arange(6).reshape(3, 2),
        "skipped": [(7, "unreadable")],
        "scale": torch.tensor(2.0),
    }
    assert batch_rows(batch) == 3
    part = rows_of(batch, 1, 3)
    assert part["id"] == ["b", "c"]
    assert part["text"].tolist() == [[2, 3], [4, 5]]
    assert part["clip"].frames_BTCHW.shape[0] == 2
    assert part["skipped"] == batch["skipped"]
    assert part["scale"].item() == 2
    with pytest.raises(UsageError, match="2 of 'text'"):
        rows_of({"image": torch.zeros(3, 1), "text": torch.zeros(2, 1)}, 0, 1)


_PROCESS = """
import sys, torch
from tests.training.test_caching import make, pairs, gradients
from moviola.training.caching import compute, rows_of
from moviola.training.processes import several
processes = several(cpu=True)
assert processes.count == 2
model, objective = make(sys.argv[1])
half = rows_of(pairs(), 6 * processes.rank, 6 * processes.rank + 6)
micro = int(sys.argv[2]) or None
losses = compute(model, objective, half, micro_batch=micro, processes=processes)
torch.save({"losses": losses, "grads": gradients(model, objective), "state": objective.state_dict()},
           f"{sys.argv[3]}/{processes.rank}.pt")
processes.wait()
if sys.argv[1] == "clip":
    from moviola.types import UsageError
    try:
        processes.require_same({"data": str(processes.rank)})
    except UsageError as error:
        assert "another data" in str(error), error
    else:
        raise SystemExit("differing processes were not noticed")
processes.wait()
processes.close()
"""


def in_two_processes(name: str, micro_batch: int, folder: Path) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-c", _PROCESS, name, str(micro_batch), str(folder)]
    started = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told[-2000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [0, 4])
@pytest.mark.parametrize("name", sorted(objectives()))
def test_two_processes_give_the_plain_gradients(name, micro_batch, tmp_path):
    plain = make(name)
    wanted = compute(*plain, pairs())
    for got in in_two_processes(name, micro_batch, tmp_path):
        for loss in wanted:
            torch.testing.assert_close(got["losses"][loss], wanted[loss], rtol=1e-5, atol=1e-5)
        expected = gradients(*plain)
        assert set(got["grads"]) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(got["grads"][key], value, rtol=1e-5, atol=1e-5, msg=named(key))
        for key, value in plain[1].state_dict().items():
            torch.testing.assert_close(got["state"][key], value, rtol=1e-5, atol=1e-5)
