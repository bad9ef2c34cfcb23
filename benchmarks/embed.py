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
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, taken in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
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


@torch.inference_mode()
def measure(batch_size: int, seconds: float, words: int) -> list[dict[str, Any]]:
    config = vit_b_32()
    ours, theirs = pair(config)
    generator = torch.Generator().manual_seed(1)
    pixels_BCHW = torch.randn(batch_size, 3, 224, 224, generator=generator)
    end = config.text.vocab_size - 1
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        name, pixels = str(dtype).removeprefix("torch."), pixels_BCHW.to(dtype)

        def unit(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(x.float(), dim=-1)

        def our_images(pixels: torch.Tensor = pixels) -> torch.Tensor:
            return ours.encode_image(pixels)

        def their_images(pixels: torch.Tensor = pixels) -> torch.Tensor:
            return theirs.get_image_features(pixel_values=pixels).pooler_output

        difference = (unit(our_images()) - unit(their_images())).abs().max().item()
        times = alternate(our_images, their_images, seconds)
        rows.append(row("images", name, batch_size, times, difference))
        # `short`: padded only to the longest text for transformers too; `context`: both given 77 places
        for label, length in (
            (f"texts of {words} tokens", words),
            (f"texts of {words} tokens padded to 77", 77),
        ):
            tokens = torch.full((batch_size, length), end)
            tokens[:, 0] = end - 1
            tokens[:, 1 : words - 1] = torch.randint(1, end - 1, (batch_size, words - 2), generator=generator)
            ours_tokens = torch.where(torch.arange(length) < words, tokens, 0)

            def our_texts(tokens: torch.Tensor = ours_tokens) -> torch.Tensor:
                return ours.encode_text(tokens)

            def their_texts(tokens: torch.Tensor = tokens) -> torch.Tensor:
                return theirs.get_text_features(input_ids=tokens).pooler_output

            difference = (unit(our_texts()) - unit(their_texts())).abs().max().item()
            times = alternate(our_texts, their_texts, seconds)
            rows.append(row(label, name, batch_size, times, difference))
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
