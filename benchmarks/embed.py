"""Embedding with ViT-B/32 (random weights): ours against transformers.CLIPModel, in one run.

The two hold the same weights and see the same pixels and ids; they take turns call by call, so that
load on the machine hits both alike. Only the towers are timed, not preprocessing or tokenizing.

    python benchmarks/embed.py [--json] [--seconds 8] [--batch-size 32] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from moviola.clip.config import ClipConfig, vit_b_32
from moviola.clip.formats.hf import KEYS, read_config
from moviola.clip.model import CLIP


def pair(config: ClipConfig) -> tuple[CLIP, Any]:
    """Our CLIP and transformers', with equal random weights."""
    import transformers

    torch.manual_seed(0)
    theirs = transformers.CLIPModel(transformers.CLIPConfig()).eval()
    assert read_config(theirs.config.to_dict(), source="transformers' default") == config
    ours = CLIP(config).eval()
    KEYS.load(ours, theirs.state_dict())
    return ours, theirs


def alternate(ours: Callable[[], Any], theirs: Callable[[], Any], seconds: float) -> tuple[list, list]:
    """Times of both, taken in turns, after one warm-up each."""
    times: tuple[list[float], list[float]] = ([], [])
    for call in (ours, theirs):
        call()
    end = time.perf_counter() + seconds
    turn = 0
    while time.perf_counter() < end or len(times[0]) < 3:
        order = (0, 1) if turn % 2 == 0 else (1, 0)  # who goes first changes every time
        for which in order:
            start = time.perf_counter()
            (ours, theirs)[which]()
            times[which].append(time.perf_counter() - start)
        turn += 1
    return times


def row(what: str, dtype: str, items: int, times: tuple[list, list], difference: float) -> dict[str, Any]:
    pairs = [b / a for a, b in zip(*times, strict=True)]
    return {
        "what": what,
        "dtype": dtype,
        "ours_per_second": round(items / statistics.median(times[0]), 2),
        "transformers_per_second": round(items / statistics.median(times[1]), 2),
        "ratio": round(statistics.median(pairs), 3),
        "ratio_quartiles": [round(float(q), 3) for q in np.quantile(pairs, [0.25, 0.75])],
        "pairs": len(pairs),
        "max_difference": difference,
    }


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x.float(), dim=-1)


@torch.inference_mode()
def measure(batch_size: int, seconds: float, words: int) -> list[dict[str, Any]]:
    ours, theirs = pair(vit_b_32())
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += measure_dtype(ours.to(dtype), theirs.to(dtype), dtype, batch_size, seconds, words)
    return rows


def measure_dtype(
    ours: CLIP, theirs: Any, dtype: torch.dtype, batch_size: int, seconds: float, words: int
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(batch_size, 3, 224, 224, generator=generator).to(dtype)
    end = ours.config.text.vocab_size - 1
    cases: list[tuple[str, Callable[[], torch.Tensor], Callable[[], torch.Tensor]]] = [
        (
            "images",
            lambda: ours.encode_image(pixels),
            lambda: theirs.get_image_features(pixel_values=pixels).pooler_output,
        )
    ]
    # transformers pads to the longest text, or to the whole context where a caller asks for it
    for label, length in ((f"texts of {words} tokens", words), (f"texts of {words} tokens padded to 77", 77)):
        padded = torch.full((batch_size, length), end)
        padded[:, 0] = end - 1
        padded[:, 1 : words - 1] = torch.randint(1, end - 1, (batch_size, words - 2), generator=generator)
        zeroed = torch.where(torch.arange(length) < words, padded, 0)
        cases.append(
            (
                label,
                lambda t=zeroed: ours.encode_text(t),  # type: ignore[misc]
                lambda t=padded: theirs.get_text_features(input_ids=t).pooler_output,  # type: ignore[misc]
            )
        )
    rows = []
    for label, our_call, their_call in cases:
        difference = (unit(our_call()) - unit(their_call())).abs().max().item()
        times = alternate(our_call, their_call, seconds)
        rows.append(row(label, str(dtype).removeprefix("torch."), batch_size, times, difference))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=8.0, help="time spent on each row")
    parser.add_argument("--words", type=int, default=12, help="tokens in each text, start and end counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.batch_size, options.seconds, options.words)
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "batch_size": options.batch_size}
    if options.json:
        print(json.dumps({**about, "rows": rows}, indent=2))
        return
    print(f"ViT-B/32, random weights, {about}")
    print(f"{'what':38} {'dtype':9} {'ours/s':>9} {'transf./s':>9} {'ratio':>6}  quartiles      max diff")
    for r in rows:
        low, high = r["ratio_quartiles"]
        print(
            f"{r['what']:38} {r['dtype']:9} {r['ours_per_second']:9.1f} {r['transformers_per_second']:9.1f} "
            f"{r['ratio']:6.2f}  {low:.2f} to {high:.2f}   {r['max_difference']:.1e}"
        )


if __name__ == "__main__":
    main()
