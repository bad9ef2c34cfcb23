"""Measure the built-in model and write its card: `python recipes/builtin/card.py --shared FOLDER`.

Writes `docs/builtin-model.md` from the figures of this run. CIFAR-10 was never trained on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from wordnet import hypernyms, read_nouns

import moviola
from moviola.data.templates import read_templates
from moviola.data.world import long_video, picture

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent.parent / "docs" / "builtin-model.md"


def trained_words(shared: Path, wordnet: Path) -> set[str]:
    """Every name, synonym and word above it that captions of the training photos could hold."""
    table = pq.read_table(shared / "tiny_imagenet_train_0.parquet", columns=["wnid", "synonyms"])
    synsets = read_nouns(wordnet)
    words: set[str] = set()
    for row in table.group_by(["wnid", "synonyms"]).aggregate([]).to_pylist():
        words |= {w.strip().lower() for w in row["synonyms"].split(",")}
        words |= {w.lower() for w in hypernyms(synsets, row["wnid"][1:])}
    return words


def made_scenes(model: moviola.clip.loaded.Model, count: int = 300) -> dict[str, float]:
    """Which of `count` made scenes (a seed never trained on) a caption belongs to: R@1 in percent.

    Once in training wording, once in wording held out from training.
    """
    scenes = [picture(99, i) for i in range(count)]
    image_ND = model.embed_frames(np.stack([s.pixels_HWC for s in scenes]))
    found = {}
    for wording in ("captions", "held_out"):
        text_ND = model.embed_texts([getattr(s, wording)[0] for s in scenes], truncate=True)
        found[wording] = 100 * float(((text_ND @ image_ND.T).argmax(1) == np.arange(count)).mean())
    return found


def speed(model: moviola.clip.loaded.Model, seconds: float = 5.0) -> float:
    """64-pixel pictures a second through the model, at the threads this process has."""
    frames = np.concatenate([long_video(5, 0).frames_THWC[:64]] * 2)
    model.embed_frames(frames)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        model.embed_frames(frames)
        done += len(frames)
    return done / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    args = parser.parse_args()
    model = moviola.load("builtin", device="cpu")
    figures: dict[str, object] = {}
    words = trained_words(args.shared, args.wordnet)
    measured = {}
    with tempfile.TemporaryDirectory() as cache:
        for templates in ("simple", "general"):
            for data in ("tiny_imagenet_val", "cifar10_test"):
                measured[data, templates] = moviola.evaluate_zero_shot(
                    model, args.shared / f"{data}.parquet", templates=templates, cache=cache
                )
    tiny, cifar = measured["tiny_imagenet_val", "simple"], measured["cifar10_test", "simple"]
    general = {data: measured[data, "general"].top1 for data in ("tiny_imagenet_val", "cifar10_test")}
    pictured = sorted(name for name in cifar.per_class if name in words)
    figures["tiny_imagenet_val"] = {"top1": tiny.top1, "top5": tiny.top5, "n": tiny.n}
    figures["general_prompts"] = general
    figures["cifar10"] = {"top1": cifar.top1, "n": cifar.n, "per_class": cifar.per_class}
    figures["cifar10_pictured"] = {
        "classes": pictured,
        "top1": float(np.mean([cifar.per_class[name] for name in pictured])),
    }
    figures["made_scenes"] = made_scenes(model)
    figures["pictures_per_second"] = speed(model)
    figures["threads"] = torch.get_num_threads()
    print(json.dumps(figures, indent=1))
    best = sorted(tiny.per_class.items(), key=lambda kv: -kv[1])
    folder = Path(moviola.__file__).parent / "assets" / "builtin"
    size = sum(f.stat().st_size for f in folder.iterdir()) / 1e6
    per_class = "\n".join(
        f"| {name} | {value:.1f} | {'yes' if name in pictured else 'no'} |"
        for name, value in sorted(cifar.per_class.items())
    )
    made = figures["made_scenes"]
    aims = (("Tiny ImageNet", tiny.top1, 25), ("CIFAR-10", cifar.top1, 30))
    reached = "; ".join(f"{name} {'reached' if top1 >= aim else 'not reached'}" for name, top1, aim in aims)
    PAGE.write_text(
        (HERE / "card.md.in")
        .read_text()
        .format(
            parameters=model.parameters / 1e6,
            size=size,
            vocab=model.tokenizer.size,
            hash=model.hash,
            tiny=tiny,
            cifar=cifar,
            pictured=figures["cifar10_pictured"]["top1"],
            pictured_count=len(pictured),
            per_class=per_class,
            made=made,
            speed=figures["pictures_per_second"],
            threads=figures["threads"],
            best=", ".join(f"{n} {v:.0f}" for n, v in best[:12]),
            worst=", ".join(f"{n} {v:.0f}" for n, v in best[-12:]),
            prompts=len(read_templates("general")),
            general=general,
            reached=reached,
        )
    )
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
