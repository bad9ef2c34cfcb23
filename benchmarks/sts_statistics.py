"""STS: what the labels and the optical flow of a clip cost, and the networks by the order of their memory.

Labels of whole arrays against the same sums pixel by pixel in Python, as a plain reading of the paper has
them (votes for directions and colour histograms; block by block). 16 frames of 112 pixels. The arms take
turns, so that load on the machine hits them alike.

    python benchmarks/sts_statistics.py [--json] [--rounds 3] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from moviola.data.clip_statistics import (
    FRAMES,
    SIDE,
    appearance_statistics,
    blocks,
    boundaries,
    motion_statistics,
)
from moviola.media.flow import optical_flow
from moviola.parts.backbones.conv3d_nets import ConvNetConfig, conv_net
from turns import in_turns


def votes_by_pixel(flow_FHW: np.ndarray) -> list[list[float]]:
    """The magnitude of each block by direction, with a loop over the pixels of each block."""
    dx_HW, dy_HW = (part[0].sum(axis=0).ravel() for part in boundaries(flow_FHW[None]))
    found = []
    for mask_P in blocks(flow_FHW.shape[-1]).mask_KP:
        votes = [0.0] * 8
        for pixel in np.flatnonzero(mask_P):
            dx, dy = float(dx_HW[pixel]), float(dy_HW[pixel])
            size, place = math.hypot(dx, dy), math.degrees(math.atan2(dy, dx)) % 360 / 45
            votes[int(place) % 8] += size * (1 - place % 1)
            votes[(int(place) + 1) % 8] += size * (place % 1)
        found.append(votes)
    return found


def histograms_by_pixel(rgb_THWC: np.ndarray) -> list[list[Counter[int]]]:
    """The colour histograms of each block and frame, with a loop over its pixels."""
    frames_TPC = rgb_THWC.reshape(len(rgb_THWC), -1, 3)
    masks = blocks(rgb_THWC.shape[1]).mask_KP
    return [[Counter(frame[m, c].tolist()) for frame in frames_TPC for c in range(3)] for m in masks]


def measure(rounds: int) -> dict[str, float]:
    """Seconds of the median round."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(2, 1, FRAMES - 1, SIDE, SIDE)).astype(np.float32)
    coarse = rng.integers(40, 216, (FRAMES, SIDE // 8, SIDE // 8, 3), np.uint8)
    rgb = coarse.repeat(8, axis=1).repeat(8, axis=2) + rng.integers(0, 30, (FRAMES, SIDE, SIDE, 3), np.uint8)
    clips = torch.randn(2, 3, FRAMES, SIDE, SIDE)
    turned = clips.contiguous(memory_format=torch.channels_last_3d)
    arms: dict[str, Callable[[], Any]] = {
        "motion labels": lambda: motion_statistics(u, v),
        "motion labels, by pixel": lambda: [votes_by_pixel(flow[0]) for flow in (u, v)],
        "appearance labels": lambda: appearance_statistics(rgb[None]),
        "appearance labels, histograms by pixel": lambda: histograms_by_pixel(rgb),
        "flow, dis": lambda: optical_flow(rgb),
        "flow, farneback": lambda: optical_flow(rgb, "farneback"),
    }
    for kind in ("c3d", "r3d", "r21d"):
        net = conv_net(ConvNetConfig(kind)).eval()
        arms[f"{kind}, 2 clips"] = lambda net=net: net(turned)
        arms[f"{kind}, 2 clips, channels first"] = lambda net=net: net(clips)
    with torch.inference_mode():
        times = in_turns(arms, rounds)
    return {name: statistics.median(taken) for name, taken in times.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    found = measure(asked.rounds)
    if asked.json:
        print(json.dumps(found, indent=1))
    else:
        for name, seconds in found.items():
            print(f"{name:42} {seconds * 1000:9.1f} ms")
