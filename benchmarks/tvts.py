"""TVTS: training with a quarter of the patches against all, and encoding against a tower of single frames.

Random weights, all arms on the same clips in one run; they take turns, so that load on the machine hits them
alike. `--paper`: the tower alone at ViT-B/16, 16 frames of 224 pixels; else whole steps of `tvts-small`.

    python benchmarks/tvts.py [--json] [--paper] [--clips 6] [--rounds 3] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from moviola.clip.vit import VisionTransformer
from moviola.parts.backbones.tubelet_vit import TubeletViT
from moviola.parts.timm_vit import PlainBlock
from moviola.systems.video.tvts import Config, Tvts, small
from moviola.training.script_sorting import ScriptSorting
from moviola.types import ClipBatch
from turns import in_turns, ratio

SHARES = {"a quarter of the patches": 0.25, "all patches": 1.0}


def paper_steps(tower: TubeletViT, frames_BTCHW: Tensor) -> dict[str, Callable[[], object]]:
    def step(share: float) -> Callable[[], object]:
        def run() -> None:
            keep = None if share == 1 else tower.draw_keep(len(frames_BTCHW), frames_BTCHW.shape[1], share)
            tower(frames_BTCHW, keep_BUK=keep).tokens_BLD.square().mean().backward()
            tower.zero_grad(set_to_none=True)

        return run

    return {name: step(share) for name, share in SHARES.items()}


def whole_steps(model: Tvts, frames_BTCHW: Tensor) -> dict[str, Callable[[], object]]:
    mask_BT = torch.ones(frames_BTCHW.shape[:2], dtype=torch.bool)
    script_BSL = torch.randint(1, model.config.text.vocab_size, (len(frames_BTCHW), 4, 20))
    batch = {"clip": ClipBatch(frames_BTCHW, mask_BT.float(), mask_BT), "script": script_BSL}

    def step(share: float) -> Callable[[], object]:
        objective = ScriptSorting(model, keep=share)

        def run() -> None:
            torch.stack(list(objective(model, batch).values())).sum().backward()
            model.zero_grad(set_to_none=True)

        return run

    return {name: step(share) for name, share in SHARES.items()}


def measure(paper: bool, clips: int, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    config = Config() if paper else small()
    side = config.vision.grid[0] * config.vision.patch_size
    frames_BTCHW = torch.randn(clips, config.frames, 3, side, side)
    if paper:
        tower = TubeletViT(config.vision, config.frames)
        steps = paper_steps(tower, frames_BTCHW)
    else:
        model = Tvts(config)
        tower, steps = model.video_model, whole_steps(model, frames_BTCHW)
    training = in_turns(steps, rounds)
    frame_tower = VisionTransformer(config.vision, config.embed_dim, "gelu", block=PlainBlock).eval()
    tower.eval()
    with torch.inference_mode():
        encoding = in_turns(
            {
                "class token": lambda: tower.vector(frames_BTCHW),
                "all tokens": lambda: tower(frames_BTCHW),
                "frame by frame": lambda: frame_tower(frames_BTCHW.flatten(0, 1)),
            },
            rounds,
        )
    rows = {f"training, {name}, clips/s": clips / statistics.median(s) for name, s in training.items()}
    rows |= {f"encoding, {name}, clips/s": clips / statistics.median(s) for name, s in encoding.items()}
    rows["training, a quarter / all"] = ratio(training, "all patches", "a quarter of the patches")
    rows["encoding, class token / all tokens"] = ratio(encoding, "all tokens", "class token")
    rows["encoding, class token / frame by frame"] = ratio(encoding, "frame by frame", "class token")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = measure(options.paper, options.clips, options.rounds)
    if options.json:
        print(json.dumps(rows))
    else:
        print("\n".join(f"{name:45} {value:8.2f}" for name, value in rows.items()))


if __name__ == "__main__":
    main()
