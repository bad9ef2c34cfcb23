"""Clips a second of every video encoder, against the plain CLIP tower of the same size frame by frame.

Random weights, ViT-B/32 for the encoders that start from a CLIP, ViT-B/16 for those with a tower of their
own; the same clips for both sides, which take turns. `--peer` adds X-CLIP of the `transformers` library
(extra `hf`).

    python benchmarks/video_encoders.py [SLUG ...] [--peer] [--json] [--clips 2] [--rounds 5] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.systems.registry import entry_class, entry_module, find
from moviola.systems.video import SYSTEMS
from moviola.types import ClipBatch
from turns import in_turns, ratio

_TEXT = TextConfig(context_length=8, vocab_size=64, width=512, layers=1, heads=8)
_OWN = {"frozen-in-time": "frozen-b-16-8f", "tvts": "tvts-b-16", "tiktok-videomae": "vmae-b"}
"""Presets of the encoders whose tower is no CLIP's."""


def tower(patch: int) -> CLIP:
    return CLIP(ClipConfig(512, VitConfig(224, patch, width=768, layers=12, heads=12), _TEXT)).eval()


def encoder(slug: str) -> tuple[nn.Module, int]:
    """The encoder, and the patch of the tower it is compared with."""
    system = find(slug)
    cls = entry_class(system)
    if hasattr(cls, "from_clip"):
        return cls.from_clip(tower(32)).eval(), 32
    preset = entry_module(system).TRAINING.presets[_OWN[slug]]
    return cls.from_config(preset().to_json()).eval(), 16


def clips_for(model: Any, clips: int, frames: int, side: int = 224) -> ClipBatch:
    count = model.frame_spec.count or frames
    frames_BTCHW = torch.randn(clips, count, 3, side, side)
    return ClipBatch(
        frames_BTCHW, torch.arange(count).expand(clips, -1) / 8, torch.ones(clips, count, dtype=torch.bool)
    )


def measure(slug: str, clips: int, frames: int, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    model, patch = encoder(slug)
    plain = tower(patch)
    batch = clips_for(model, clips, frames)
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: model.encode_video(batch),
        "tower": lambda: plain.encode_image(batch.frames_BTCHW.flatten(0, 1)),
    }
    with torch.inference_mode():
        times = in_turns(calls, rounds)
    return {
        "frames": batch.frames_BTCHW.shape[1],
        "patch": patch,
        "clips/s": clips / statistics.median(times["ours"]),
        "tower, clips/s": clips / statistics.median(times["tower"]),
        "time, encoder / tower": ratio(times, "ours", "tower"),
    }


def against_transformers(clips: int, rounds: int) -> dict[str, float]:
    """X-CLIP with 8 frames, ViT-B/32: ours and the library's, both random."""
    from transformers import XCLIPConfig, XCLIPModel, XCLIPVisionConfig

    vision = XCLIPVisionConfig(patch_size=32, num_frames=8, mit_num_hidden_layers=1)
    theirs = XCLIPModel(XCLIPConfig(vision_config=vision.to_dict())).eval()
    model, _ = encoder("x-clip")
    batch = clips_for(model, clips, 8)
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: model.encode_video(batch),
        "transformers": lambda: theirs.get_video_features(pixel_values=batch.frames_BTCHW),
    }
    with torch.inference_mode():
        times = in_turns(calls, rounds)
    return {
        "clips/s": clips / statistics.median(times["ours"]),
        "transformers, clips/s": clips / statistics.median(times["transformers"]),
        "time, transformers / ours": ratio(times, "transformers", "ours"),
    }


def main() -> None:
    known = [s.slug for s in SYSTEMS if hasattr(entry_class(s), "from_clip") or s.slug in _OWN]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("slugs", nargs="*", default=known, metavar="SLUG")
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--frames", type=int, default=8, help="where the encoder takes any number")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peer", action="store_true", help="also X-CLIP of the transformers library")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = {slug: measure(slug, options.clips, options.frames, options.rounds) for slug in options.slugs}
    if options.peer:
        rows["x-clip, against transformers"] = against_transformers(options.clips, options.rounds)
    about = {"torch": torch.__version__, "threads": options.threads, "clips": options.clips}
    if options.json:
        print(json.dumps({**about, "rows": rows}, indent=2))
        return
    print(f"Forward, random weights, 224 pixels, {about}")
    for slug, figures in rows.items():
        print(slug.ljust(30), "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
