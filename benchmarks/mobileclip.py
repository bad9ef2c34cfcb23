"""MobileCLIP's towers folded against not folded, in both memory layouts (random weights), in one run.

All variants hold the same weights and see the same inputs; they take turns call by call, so that load on
the machine hits all alike. Only the towers are timed, not preprocessing or tokenizing. Ratios are to
the tower as it is trained (not folded, contiguous), turn by turn.

    python benchmarks/mobileclip.py [--json] [--model mobileclip_s0] [--turns 8] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moviola.systems.pretraining.mobileclip import PRESETS, MobileClip, create, reparameterize

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def trained_like(name: str) -> MobileClip:
    """Random weights whose BatchNorms and layer scales all act, so that folding has something to do."""
    torch.manual_seed(0)
    model = create(name)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "layer_scale" in parameter_name:
                parameter.uniform_(0.05, 0.2)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                mean, var = module.running_mean, module.running_var
                assert mean is not None
                assert var is not None
                mean.normal_(0, 0.1)
                var.uniform_(0.5, 1.5)
    return model.eval()


def take_turns(calls: dict[str, Callable[[], Tensor]], turns: int) -> dict[str, list[float]]:
    """Times of all, one call each a turn, in an order that rotates; a warm-up call each comes first."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            calls[name]()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def rows(what: str, calls: dict[str, Callable[[], Tensor]], items: int, turns: int) -> list[dict[str, Any]]:
    first = next(iter(calls))
    want = calls[first]().float()
    times = take_turns(calls, turns)
    made = []
    for name, call in calls.items():
        ratios = [base / own for base, own in zip(times[first], times[name], strict=True)]
        made.append(
            {
                "what": what,
                "variant": name,
                "per_second": round(items / statistics.median(times[name]), 2),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_quartiles": [round(float(q), 3) for q in np.quantile(ratios, [0.25, 0.75])],
                "turns": turns,
                "max_difference": float((call().float() - want).abs().max() / want.abs().max()),
            }
        )
    return made


@torch.inference_mode()
def measure(name: str, batch_size: int, turns: int) -> list[dict[str, Any]]:
    plain = trained_like(name)
    models = {"not folded": plain, "folded": reparameterize(plain)}
    size, config = plain.recipe.size, plain.config
    pixels = torch.rand(batch_size, 3, *size, generator=torch.Generator().manual_seed(1))
    tokens = torch.zeros(batch_size, config.text.context_length, dtype=torch.int64)
    tokens[:, :12] = torch.randint(1, config.text.vocab_size - 1, (batch_size, 12))
    tokens[:, 12] = config.text.vocab_size - 1
    images: dict[str, Callable[[], Tensor]] = {}
    texts: dict[str, Callable[[], Tensor]] = {}
    for label, model in models.items():
        for layout, memory_format in LAYOUTS.items():
            placed = _copy(model)
            placed.to(memory_format=memory_format)  # type: ignore[call-overload]
            given = pixels.to(memory_format=memory_format)
            images[f"{label}, {layout}"] = lambda m=placed, x=given: m.encode_image(x)  # type: ignore[misc]
            texts[f"{label}, {layout}"] = lambda m=placed: m.encode_text(tokens)  # type: ignore[misc]
    return rows("images", images, batch_size, turns) + rows("texts", texts, batch_size, turns)


def _copy(model: MobileClip) -> MobileClip:
    made = MobileClip(model.config)
    made.load_state_dict(model.state_dict())
    return made.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="mobileclip_s0", choices=list(PRESETS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.model, options.batch_size, options.turns)
    about = {
        "model": options.model,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "batch_size": options.batch_size,
    }
    if options.json:
        print(json.dumps({**about, "rows": found}, indent=2))
        return
    print(f"random weights, {about}")
    print(f"{'what':8} {'variant':26} {'per s':>8} {'ratio':>6}  quartiles      max difference")
    for r in found:
        low, high = r["ratio_quartiles"]
        print(
            f"{r['what']:8} {r['variant']:26} {r['per_second']:8.1f} {r['ratio']:6.2f}  "
            f"{low:.2f} to {high:.2f}   {r['max_difference']:.1e}"
        )


if __name__ == "__main__":
    main()
