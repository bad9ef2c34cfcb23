"""Are merged moments better than single frames, fixed windows and chance?

    python benchmarks/moments.py [--model builtin] [--videos 200] [--every 0.5] [--json]
    python benchmarks/moments.py --planted 0.5      # no model: planted scores with noise
    python benchmarks/moments.py --tune             # other seeds than the reported ones

Makes videos with planted events (`moviola.data.world.long_video`), writes them as .mp4, indexes them
with `moviola.index`, and asks for every event in words held out from training, within its video.
Arms, all from the same stored scores:
  moviola        store/moments.py, as `moviola search` uses it
  best frame     every frame with the time it stands for, best first
  5 s windows    [0, 5), [5, 10), ... by the mean score of their frames
  random         the moments of random scores
R@1: the first answer has tIoU of at least 0.5 (0.7) with an event of that wording. mAP: mean over
tIoU 0.5, 0.55 ... 0.95 of the average precision, events of that wording being the right answers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moviola.data.world import long_video
from moviola.media import write_video
from moviola.store.index import Index
from moviola.store.moments import MomentSettings, extents, stretches
from moviola.types import TimeSpan
from moviola.verbs.index import index
from moviola.verbs.load import load

REPORTED_SEED, TUNING_SEED = 2026, 7
THRESHOLDS = np.arange(0.5, 0.96, 0.05)


@dataclass(frozen=True)
class Question:
    """One wording asked of one video, with the scores of its frames and the right answers."""

    scores_T: np.ndarray
    times_T: np.ndarray
    shots_T: np.ndarray
    duration: float
    level: float
    truth: tuple[TimeSpan, ...]


Arm = Callable[[Question], list[TimeSpan]]


def questions(
    model_name: str | None, planted: float | None, seed: int, args: argparse.Namespace
) -> list[Question]:
    """Make, write and index the videos; one question per event and wording."""
    rng = np.random.default_rng(seed)
    asked: list[tuple[str, str, tuple[TimeSpan, ...]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        media = Path(scratch) / "media"
        media.mkdir()
        for n in range(args.videos):
            made = long_video(seed, n, duration=args.duration, events=args.events)
            path = write_video(media / f"{n:04d}.mp4", made.frames_THWC, made.rate)
            for event in made.events:
                wording = event.held_out[0]
                same = tuple(
                    e.span for e in made.events if wording in e.held_out or e.captions == event.captions
                )
                asked.append((str(path), wording, same))
        model: Any = _Blank() if model_name is None else load(model_name, device=args.device)
        index(media, Path(scratch) / "index", model=model, every=args.every)
        opened = Index(Path(scratch) / "index")
        units = opened.units
        bounds = units.bounds(len(opened.files))
        number = {row.file: f for f, row in enumerate(opened.files)}
        wordings = sorted({wording for _, wording, _ in asked})
        if model_name is not None:
            scores_NQ = opened.scores(model.embed_texts(wordings, truncate=True))
        out = []
        for file, wording, truth in asked:
            f = number[file]
            rows = slice(bounds[f], bounds[f + 1])
            times_T = units.start_N[rows]
            if model_name is None:
                inside = np.array([any(s.start <= t < s.end for s in truth) for t in times_T])
                scores_T = inside + rng.normal(0, planted, len(times_T))
                level = 0.0
            else:
                column = scores_NQ[:, wordings.index(wording)]
                scores_T, level = column[rows], float(np.median(column))
            out.append(
                Question(scores_T, times_T, units.shot_N[rows], opened.files[f].duration, level, truth)
            )
    return out


class _Blank:
    """Stands in for a model where the scores are planted: it only keeps the sampling honest."""

    def __init__(self) -> None:
        from moviola.types import FrameSpec, Recipe

        self.name, self.system, self.hash, self.dim = "planted", "clip", "0" * 16, 8
        self.has_text, self.separable, self.adaptation = False, True, "none"
        self.frame_spec, self.recipe = FrameSpec(), Recipe(size=(64, 64))

    def embed_frames(self, frames_THWC: np.ndarray, **_: Any) -> np.ndarray:
        return np.ones((len(frames_THWC), 8), np.float32)


def moviola_arm(settings: MomentSettings | None = None) -> Arm:
    def arm(q: Question) -> list[TimeSpan]:
        found = stretches(q.scores_T, q.times_T, q.shots_T, q.duration, level=q.level, settings=settings)
        return [TimeSpan(one.start, one.end) for one in found]

    return arm


def best_frame(q: Question) -> list[TimeSpan]:
    start_T, end_T = extents(q.times_T, q.duration)
    return [TimeSpan(float(start_T[i]), float(end_T[i])) for i in np.argsort(-q.scores_T, kind="stable")]


def windows(q: Question) -> list[TimeSpan]:
    cell_T = (q.times_T // 5).astype(int)
    means = {int(c): float(q.scores_T[cell_T == c].mean()) for c in np.unique(cell_T)}
    best = sorted(means, key=lambda c: -means[c])
    return [TimeSpan(5.0 * c, min(5.0 * c + 5, max(q.duration, 5.0 * c))) for c in best]


def random_arm(seed: int) -> Arm:
    rng = np.random.default_rng(seed)

    def arm(q: Question) -> list[TimeSpan]:
        noise_T = rng.normal(size=len(q.times_T))
        found = stretches(noise_T, q.times_T, q.shots_T, q.duration, level=0.0)
        return [TimeSpan(one.start, one.end) for one in found]

    return arm


def average_precision(answers: Sequence[TimeSpan], truth: Sequence[TimeSpan], threshold: float) -> float:
    """Each right answer may be found once; answers in order, best first."""
    open_, hits, total = list(truth), 0, 0.0
    for rank, answer in enumerate(answers, 1):
        best = max(open_, key=answer.iou, default=None)
        if best is not None and answer.iou(best) >= threshold:
            open_.remove(best)
            hits += 1
            total += hits / rank
    return total / len(truth)


def measure(arm: Arm, asked: Sequence[Question]) -> dict[str, float]:
    first, ap = [], []
    for q in asked:
        answers = arm(q)
        first.append(max((answers[0].iou(t) for t in q.truth), default=0.0) if answers else 0.0)
        ap.append([average_precision(answers, q.truth, t) for t in THRESHOLDS])
    return {
        "R@1 tIoU 0.5": 100 * float(np.mean([iou >= 0.5 for iou in first])),
        "R@1 tIoU 0.7": 100 * float(np.mean([iou >= 0.7 for iou in first])),
        "mAP": 100 * float(np.mean(ap)),
        "mAP at 0.5": 100 * float(np.mean([one[0] for one in ap])),
        "mean tIoU": 100 * float(np.mean(first)),
    }


def tune(asked: Sequence[Question]) -> None:
    """Print the best settings of a grid, by R@1 at 0.5 plus mAP."""
    found = []
    grid = itertools.product(
        (3.0, 4.5, 6.0), (4.0, 8.0), (2.0, 4.0), (0.1, 0.3, 1.0), (3.0, 10.0), (0.3, 0.4, 0.5), (0.3, 0.6)
    )
    for smooth, broad, widest, across, prior, keep, wall in grid:
        settings = MomentSettings(smooth, 0.5, broad, widest, across, prior, keep, wall)
        result = measure(moviola_arm(settings), asked)
        found.append((result["R@1 tIoU 0.5"] + result["mAP"], settings, result))
    for total, settings, result in sorted(found, key=lambda one: -one[0])[:8]:
        print(f"{total:.1f} R@1 {result['R@1 tIoU 0.5']:.1f} mAP {result['mAP']:.1f} {settings}")
    now = measure(moviola_arm(), asked)
    print(f"now: R@1 {now['R@1 tIoU 0.5']:.1f} mAP {now['mAP']:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin")
    parser.add_argument(
        "--planted", type=float, help="noise beside a planted signal of 1, instead of a model"
    )
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--duration", type=float, default=60.0)
    parser.add_argument("--events", type=int, default=3)
    parser.add_argument("--every", type=float, default=0.5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    began = time.monotonic()
    seed = TUNING_SEED if args.tune else REPORTED_SEED
    asked = questions(None if args.planted is not None else args.model, args.planted, seed, args)
    if args.tune:
        tune(asked)
        return
    arms: dict[str, Arm] = {
        "moviola": moviola_arm(),
        "best frame": best_frame,
        "5 s windows": windows,
        "random": random_arm(seed),
    }
    table = {name: measure(arm, asked) for name, arm in arms.items()}
    what = {
        "videos": args.videos,
        "questions": len(asked),
        "scores": f"planted, noise {args.planted:g}" if args.planted is not None else args.model,
        "every": args.every,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
    }
    if args.json:
        print(json.dumps({**what, "arms": table}, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in what.items()))
    names = list(next(iter(table.values())))
    print(f"{'':14s}" + "".join(f"{name:>15s}" for name in names))
    for arm, row in table.items():
        print(f"{arm:14s}" + "".join(f"{row[name]:15.1f}" for name in names))


if __name__ == "__main__":
    main()
