"""Pre-training by dual masking on more clips, and on clean clips against more of them with cuts.

Made clips of 8 frames, a model of two layers, equal steps in every row. A noisy set is three parts clips with
a cut in the middle (another clip's second half) to one part whole ones: what `clean_clips` is for. "Error"
is the loss on clips of the same kind that were not trained on, by the same masks for all; the rest is the
claim's measure, fine-tuning on 256 labelled clips.

    python benchmarks/pretrain_size.py [--json] [--sizes 32 128 512 2048] [--steps 1400] [--seeds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch
from torch import Tensor

from moviola.data.order_clips import clip_batch
from moviola.systems.video.tiktok_videomae import DualMasking, VideoMae, pretrain, small_model
from moviola.training.few_labels import few_label_accuracy, unlabelled


def with_cuts(frames_NTCSS: Tensor) -> Tensor:
    """The clips again, three of four with the second half of another one."""
    half = frames_NTCSS.shape[1] // 2
    whole_N = torch.arange(len(frames_NTCSS)) % 4 == 0
    cut = torch.cat([frames_NTCSS[:, :half], frames_NTCSS.roll(1, 0)[:, half:]], dim=1)
    return torch.where(whole_N[:, None, None, None, None], frames_NTCSS, cut)


def error(model: VideoMae, frames_NTCSS: Tensor) -> float:
    objective = DualMasking(model, mask_ratio=0.75, samples=4).eval()
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(objective(model, {"clip": clip_batch(frames_NTCSS)})["pixels"])


def measure(sizes: list[int], steps: int, seeds: int) -> dict[str, dict[str, float]]:
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        every = unlabelled(seed, max(sizes))
        every = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))]
        held = unlabelled(seed + 500, 400)
        larger = sizes[-1]
        sets = {f"{size} clips": every[:size] for size in sizes}
        sets |= {f"{larger} clips, {3 * larger // 4} of them with cuts": with_cuts(every[:larger])}
        for name, frames in {"none": None, **sets}.items():
            model = small_model(seed)
            if frames is not None:
                pretrain(model, frames, steps, seed)
            row = {"error x 1000": 1000 * error(model, held)} if frames is not None else {}
            row |= few_label_accuracy(model, seed, labelled=256, steps=250, test=800)
            found.setdefault(name, []).append(row)
    return {
        name: {what: statistics.mean(row[what] for row in rows) for what in rows[0]}
        | {f"{what}, spread": statistics.stdev(row[what] for row in rows) for what in rows[0] if seeds > 1}
        for name, rows in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 128, 512, 2048])
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(sorted(options.sizes), options.steps, options.seeds)
    if options.json:
        print(json.dumps({"steps": options.steps, "seeds": options.seeds, "rows": rows}, indent=2))
        return
    for name, figures in rows.items():
        print(name)
        for what, value in figures.items():
            print(f"  {what:35} {value:8.2f}")


if __name__ == "__main__":
    main()
