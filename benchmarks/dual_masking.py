"""Dual masking: time and memory of a pre-training step with both masks, without the decoder's, without any.

ViT-B with random weights, a clip of 16 frames of 224 pixels, all arms in turns in one run, so that load on
the machine hits them alike. "No mask" runs the encoder on all tubelets and says all of them, as an
autoencoder without masks would. Memory is what is kept for the backward pass, weights not counted.

    python benchmarks/dual_masking.py [--json] [--clips 1] [--preset vmae-b] [--rounds 3] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from dist import kept_mb
from moviola.parts.backbones.video_mae import pixel_targets
from moviola.parts.video_masks import kept, take
from moviola.systems.video.tiktok_videomae import PRESETS, DualMasking, VideoMae
from turns import in_turns, ratio

BOTH, HIDDEN, NONE = "both masks", "encoder's mask alone", "no mask"


def measure(preset: str, clips: int, rounds: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    model = VideoMae(PRESETS[preset]())
    frames_BTCPP = torch.randn(clips, *model.encoder.shape)
    objective = DualMasking(model, samples=1)
    hidden_BN, skipped_BN = objective.masks(model.encoder.grid, clips)

    def masked(skip_BN: Tensor) -> Tensor:
        found = objective.errors(model, frames_BTCPP, hidden_BN, skip_BN)
        return objective.loss(model, found)["pixels"]

    def whole() -> Tensor:
        every_BN = torch.arange(hidden_BN.shape[1]).expand(clips, -1)
        patches_BNX = model.encoder.patches(frames_BTCPP)
        target_BNX = pixel_targets(patches_BNX, model.recipe.mean, model.recipe.std)
        return (model.reconstruct(patches_BNX, every_BN, every_BN) - target_BNX).square().mean()

    def of_embedded() -> Tensor:
        """Both masks as released: every tubelet becomes a token first, every target is computed."""
        seen_BV, said_BK = kept(hidden_BN), kept(skipped_BN)
        x_BVD = model.encoder.norm(model.encoder.run(take(model.encoder.embed(frames_BTCPP), seen_BV)))
        patches_BNX = model.encoder.patches(frames_BTCPP)
        target_BKX = take(pixel_targets(patches_BNX, model.recipe.mean, model.recipe.std), said_BK)
        decoder = model.check_decoder()
        numbers_BKX = decoder(model.decoder_input(x_BVD, seen_BV, said_BK), said_BK.shape[1])
        counts_BK = hidden_BN.gather(1, said_BK)
        return ((numbers_BKX - target_BKX).square().mean(-1) * counts_BK).sum() / counts_BK.sum()

    losses: dict[str, Callable[[], Tensor]] = {
        BOTH: lambda: masked(skipped_BN),
        "both masks, as released": of_embedded,
        HIDDEN: lambda: masked(~hidden_BN),
        NONE: whole,
    }
    torch.testing.assert_close(losses[BOTH](), of_embedded())

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            losses[name]().backward()
            model.zero_grad(set_to_none=True)

        return run

    count = hidden_BN.shape[1]
    seen, said = count - int(hidden_BN[0].sum()), count - int(skipped_BN[0].sum())
    tokens = {
        BOTH: (seen, seen + said),
        "both masks, as released": (seen, seen + said),
        HIDDEN: (seen, count),
        NONE: (count, 2 * count),
    }
    times = in_turns({name: step(name) for name in losses}, rounds)
    rows = {
        name: {
            "encoder tokens a clip": tokens[name][0],
            "decoder tokens a clip": tokens[name][1],
            "kept for backward, MB": kept_mb(losses[name], model),
            "step, s a clip": statistics.median(times[name]) / clips,
        }
        for name in losses
    }
    rows["ratios"] = {f"step, {name} / both masks": ratio(times, name, BOTH) for name in list(losses)[1:]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--preset", choices=list(PRESETS), default="vmae-b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.preset, options.clips, options.rounds)
    about = {"torch": torch.__version__, **{k: v for k, v in vars(options).items() if k != "json"}}
    if options.json:
        print(json.dumps({**about, "rows": rows}, indent=2))
        return
    print(f"random weights, {about}")
    for name, figures in rows.items():
        print(f"\n{name}")
        for what, value in figures.items():
            print(f"  {what:45} {value:10.3f}")


if __name__ == "__main__":
    main()
