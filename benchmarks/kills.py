"""Kill `index` at random moments, many times, and compare what remains with a run that was left alone.

    python benchmarks/kills.py [--kills 30] [--files 200] [--model NAME] [--seed 0] [--json]

Makes the files (pictures, short videos, one long video), indexes them once undisturbed, then starts
the same run again and again in a process of its own and ends it with SIGKILL after a random time.
While it runs the index is read over and over. In the end one run is left to finish. Checked: every
state that was read is consistent (no row twice, none that the undisturbed index lacks); the last one
has the same (file, time) rows, and vectors within 2e-3. Without --model a small CLIP with random
weights is made on the spot, so nothing needs to be downloaded.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from moviola.media import write_video
from moviola.store.format import MANIFEST
from moviola.store.index import Index

_RUN = """
import sys
import moviola.verbs.index as verb
verb.COMMIT_SECONDS = float(sys.argv[4])
from moviola.verbs.load import load
model = load(sys.argv[3], device="cpu")
print("go", flush=True)
verb.index(sys.argv[1], sys.argv[2], model=model, every=0.5, batch_size=8)
"""


def make_files(folder: Path, count: int, seed: int) -> None:
    """`count` files: three quarters pictures, one long video, the rest short videos."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    pictures = count * 3 // 4
    for n in range(pictures):
        Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).resize((160, 120)).save(
            folder / f"picture{n:04d}.png"
        )
    for n in range(count - pictures - 1):
        write_video(folder / f"short{n:04d}.mp4", _frames(rng, rng.integers(15, 45)), 10)
    write_video(folder / "long.mp4", _frames(rng, 1200), 10)


def _frames(rng: np.random.Generator, count: int) -> Iterator[np.ndarray]:
    """Patches that change every two seconds and move in between."""
    patch = rng.integers(0, 255, (6, 8, 3), np.uint8)
    for n in range(count):
        if n % 20 == 0:
            patch = rng.integers(0, 255, (6, 8, 3), np.uint8)
        yield np.roll(np.kron(patch, np.ones((16, 16, 1), np.uint8)), n, axis=1)


def random_model(folder: Path) -> Path:
    """A native folder with a small CLIP of random weights."""
    import torch

    from moviola.clip.config import ClipConfig, TextConfig, VitConfig
    from moviola.clip.loaded import Model
    from moviola.clip.model import CLIP

    torch.manual_seed(0)
    config = ClipConfig(
        embed_dim=64,
        vision=VitConfig(image_size=64, patch_size=16, width=64, layers=2, heads=2),
        text=TextConfig(vocab_size=64, width=64, layers=1, heads=2),
    )
    return Model(CLIP(config), config=config.to_json(), name="random", device="cpu").save(folder)


def contents(folder: Path) -> tuple[list[tuple[bytes, float]], np.ndarray]:
    index = Index(folder)
    units = index.units
    rows = [
        (index.files[f].path, round(float(t), 6)) for f, t in zip(units.file_N, units.start_N, strict=True)
    ]
    return rows, index.vectors(np.arange(len(units)), unit_length=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", type=float, default=0.2, help="seconds between commits (20 in real use)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        media, whole, killed = (Path(scratch) / name for name in ("media", "whole", "killed"))
        make_files(media, args.files, args.seed)
        model = args.model or str(random_model(Path(scratch) / "model"))

        def start(to: Path) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-c", _RUN, str(media), str(to), model, str(args.commit)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert process.stdout is not None
            if process.stdout.readline() != b"go\n":
                raise SystemExit("the indexing process did not start")
            return process

        process, began = start(whole), time.monotonic()
        if process.wait() != 0:
            raise SystemExit("the undisturbed run failed")
        took = time.monotonic() - began
        rows, vectors = contents(whole)
        known = set(rows)

        reads, moments, sizes = 0, [], []
        for _ in range(args.kills):
            process, began = start(killed), time.monotonic()
            # Each run goes on where the last one was killed: short runs, or it would be done too soon.
            moments.append(0.3 + chance.uniform(0, 2) * took / args.kills)
            while time.monotonic() - began < moments[-1] and process.poll() is None:
                if (killed / MANIFEST).exists():
                    _check(contents(killed)[0], known)
                    reads += 1
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            sizes.append(len(contents(killed)[0]) if (killed / MANIFEST).exists() else 0)
        if start(killed).wait() != 0:
            raise SystemExit("the clean run failed")
        got, got_vectors = contents(killed)
        result = {
            "files": args.files,
            "kills": args.kills,
            "kills_before_the_end": sum(size < len(rows) for size in sizes),
            "undisturbed_run_seconds": took,
            "rows": len(rows),
            "rows_after_each_kill": sizes,
            "reads_meanwhile": reads,
            "same_rows": got == rows,
            "twice": len(got) - len(set(got)),
            "largest_vector_difference": float(np.abs(got_vectors - vectors).max()) if got == rows else None,
            "same_shots": bool(
                got == rows and (Index(killed).units.shot_N == Index(whole).units.shot_N).all()
            ),
        }
    print(json.dumps(result) if args.json else "\n".join(f"{key}: {value}" for key, value in result.items()))
    if not result["same_rows"] or result["largest_vector_difference"] > 2e-3:
        raise SystemExit(1)


def _check(rows: list[tuple[bytes, float]], known: set[tuple[bytes, float]]) -> None:
    if len(rows) != len(set(rows)) or not set(rows) <= known:
        raise SystemExit("a state with doubled or foreign rows was read")


if __name__ == "__main__":
    main()
