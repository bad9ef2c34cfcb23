"""Training: the loss of a large batch in bands against the whole matrix, and our loop against a bare one.

The loss arms run one process each and tell their peak memory; running out of memory is a result. The
loops train the same tower on the same batches in turns.

    python benchmarks/train.py [--json] [--rows 32768] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.training.caching import compute
from moviola.training.loop import TrainConfig, train
from moviola.training.nce import info_nce, sigmoid_loss
from moviola.training.objectives import Contrastive

WIDTH = 512
LOSSES = ("InfoNCE, bands", "InfoNCE, whole matrix", "sigmoid, bands", "sigmoid, whole matrix")


def peak_mb() -> float:
    """Most memory this process held at a time; a child's ru_maxrss starts at its parent's, VmHWM does not."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def one_loss(name: str, rows: int) -> dict[str, float]:
    """Forward and backward of one loss; a hundredth of it warms up first."""
    if rows > 1024:
        one_loss(name, 1024)
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(rows, WIDTH), dim=-1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(20.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    before = peak_mb()

    def loss() -> torch.Tensor:
        if name == "InfoNCE, bands":
            return info_nce(image, text, scale)
        if name == "sigmoid, bands":
            return sigmoid_loss(image, text, scale, bias)
        logits = scale * image @ text.T
        own = torch.arange(rows)
        if name == "InfoNCE, whole matrix":
            return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return -F.logsigmoid((2 * torch.eye(rows) - 1) * (logits + bias)).sum() / rows

    start = time.perf_counter()
    value = loss()
    value.backward()
    seconds = time.perf_counter() - start
    norm = float(image.grad.norm()) if image.grad is not None else float("nan")
    return {"seconds": seconds, "peak_mb": peak_mb() - before, "loss": value.item(), "gradient_norm": norm}


def losses(rows: int, threads: int) -> list[dict[str, Any]]:
    found = []
    for name in LOSSES:
        command = [sys.executable, __file__, "--loss", name, "--rows", str(rows), "--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        figures = json.loads(done.stdout) if done.returncode == 0 else {"failed": done.returncode}
        found.append({"what": name, "rows": rows, **figures})
    return found


def cached_step(rows: int, micro_batch: int | None) -> dict[str, float]:
    """A step of a small CLIP over `rows` pairs, all at once or by gradient caching."""
    model, batch = tower(), pairs(rows)
    before = peak_mb()
    start = time.perf_counter()
    loss = compute(model, Contrastive(), batch, micro_batch=micro_batch)["contrastive"]
    return {"seconds": time.perf_counter() - start, "peak_mb": peak_mb() - before, "loss": loss.item()}


def caching(rows: int, threads: int) -> list[dict[str, Any]]:
    found = []
    for micro in (0, rows // 8):
        command = [
            sys.executable,
            __file__,
            "--step",
            str(micro),
            "--rows",
            str(rows),
            "--threads",
            str(threads),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        figures = json.loads(done.stdout) if done.returncode == 0 else {"failed": done.returncode}
        found.append({"what": f"step, {micro or rows} rows in the towers", "rows": rows, **figures})
    return found


def tower() -> CLIP:
    torch.manual_seed(0)
    vision = VitConfig(image_size=64, patch_size=8, width=192, layers=6, heads=3)
    text = TextConfig(context_length=32, vocab_size=8192, width=192, layers=4, heads=3)
    return CLIP(ClipConfig(256, vision, text)).train()


def pairs(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 8000, (rows, 16), generator=generator)
    text[:, -1] = 8191
    return {"image": torch.randn(rows, 3, 64, 64, generator=generator), "text": text}


class Ready:
    """Batches that are in memory already: only the loop is timed."""

    def __init__(self, rows: int) -> None:
        self.pairs = pairs(rows)

    def __len__(self) -> int:
        return len(self.pairs["image"])

    def batch(self, rows: np.ndarray, *, seed: int, epoch: int, step: int) -> dict[str, torch.Tensor]:
        return {name: tensor[rows] for name, tensor in self.pairs.items()}


def loops(steps: int = 12, batch: int = 64, turns: int = 4) -> list[dict[str, Any]]:
    """Pairs a second of our loop (with its log and one checkpoint) and of a bare one, in turns."""
    data = Ready(batch * steps)
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for turn in range(turns + 1):
        for name in ("ours", "bare") if turn % 2 else ("bare", "ours"):
            model = tower()
            start = time.perf_counter()
            if name == "ours":
                with tempfile.TemporaryDirectory() as folder:
                    config = TrainConfig(steps=steps, batch_size=batch, warmup=2, save_every=steps)
                    train(model, Contrastive(), data, config, Path(folder))
            else:
                bare(model, data, steps, batch)
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(times["ours"], times["bare"], strict=True))
    speed = {name: steps * batch / statistics.median(taken) for name, taken in times.items()}
    figures = {"pairs_per_second": speed["ours"], "bare_pairs_per_second": speed["bare"], "ratio": ratio}
    return [{"what": "training loop", **figures}]


def bare(model: CLIP, data: Ready, steps: int, batch: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    own = torch.arange(batch)
    for step in range(steps):
        part = data.batch(np.arange(step * batch, (step + 1) * batch), seed=0, epoch=0, step=step)
        image = F.normalize(model.encode_image(part["image"]), dim=-1)
        text = F.normalize(model.encode_text(part["text"]), dim=-1)
        logits = model.logit_scale.exp() * image @ text.T
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def show(found: list[dict[str, Any]]) -> None:
    for one in found:
        what = one.pop("what")
        told = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in one.items())
        print(f"{what}: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, default=32_768)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--loss", choices=LOSSES, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.loss:
        print(json.dumps(one_loss(args.loss, args.rows)))
        return
    if args.step is not None:
        print(json.dumps(cached_step(args.rows, args.step or None)))
        return
    found: list[dict[str, Any]] = []
    for measure in (
        loops,
        lambda: caching(2048, args.threads),
        lambda: losses(args.rows, args.threads),
    ):
        some = measure()
        found += some
        if not args.json:
            show(some)
    if args.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
