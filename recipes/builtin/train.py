"""Train the built-in model: `python recipes/builtin/train.py --shared FOLDER --run runs/builtin`.

Four phases, resumable by running the same command again. The stem learns first, as the lower half of
a small convolutional classifier of the photos: it does so several times faster than the transformer
above it. Then the whole model learns names at 48 pixels, where a step costs little more than half,
then the real size with frames of made clips added, and last the same with more general words and with
photos at half resolution, since small pictures from elsewhere come enlarged. Needs the photo tables
`tiny_imagenet_train_{0,1}.parquet` and a WordNet database folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from evaluate import zero_shot_accuracy
from torch import Tensor, nn

from data import (
    MEAN,
    SIZE,
    STD,
    BuiltinData,
    Photos,
    add_hypernyms,
    prepare_clips,
    prepare_photos,
    prepare_world,
    train_tokenizer,
)
from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.clip.tokenizer import Tokenizer
from moviola.clip.vit import ConvStage
from moviola.training.loop import Progress, TrainConfig, train
from moviola.training.objectives import Contrastive, decay_groups
from moviola.types import Batch, Episode, Needs, Recipe

CONFIG = ClipConfig(
    embed_dim=256,
    vision=VitConfig(
        image_size=SIZE, patch_size=8, width=192, layers=4, heads=3, stem=((32, 0), (64, 2), (192, 2))
    ),
    text=TextConfig(context_length=77, vocab_size=8192, width=192, layers=4, heads=3),
    activation="gelu",
)


class StemClassifier(nn.Module):
    """Cross-entropy of the photos' classes above the image tower's stem. Implements `Objective`.

    One more convolutional stage, a mean over places and a linear layer; they stay behind afterwards.
    """

    needs = Needs()
    scope: Literal["pair", "token", "local"] = "token"

    def __init__(self, classes: int, width: int = 320) -> None:
        super().__init__()
        self.stage = ConvStage(CONFIG.vision.stem[-1][0], width, 1)
        self.classify = nn.Linear(width, classes)

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        places_BCHW = self.stage(model.visual.stem(batch["image"]))
        logits_BC = self.classify(places_BCHW.mean((2, 3))).float()
        return {"cross_entropy": F.cross_entropy(logits_BC, batch["label"], label_smoothing=0.1)}

    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        return decay_groups(nn.ModuleList([model.visual.stem, self]), 0.1)

    def lr_factors(self, step: int, steps: int) -> None:
        return None

    def on_episode(self, model: nn.Module, episode: Episode) -> None:
        return

    def after_step(self, model: nn.Module) -> None:
        return


def report(progress: Progress) -> None:
    losses = ", ".join(f"{name} {value:.3f}" for name, value in progress.losses.items())
    print(
        f"step {progress.step}/{progress.steps}  {losses}  {progress.rows_per_second:.0f} rows/s  "
        f"{progress.seconds_left / 60:.0f} min left",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="folder with the photo tables")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--run", type=Path, default=Path("runs/builtin"))
    parser.add_argument("--world", type=int, default=36_000, help="made scenes")
    parser.add_argument("--clips", type=int, default=6_000, help="made clips")
    parser.add_argument("--stem-steps", type=int, default=5800)
    parser.add_argument("--names-steps", type=int, default=1000)
    parser.add_argument("--full-steps", type=int, default=700)
    parser.add_argument("--last-steps", type=int, default=450)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cache = args.run / "data"
    cache.mkdir(parents=True, exist_ok=True)
    prepare_photos(args.shared, cache)
    add_hypernyms(cache, args.wordnet)
    prepare_world(cache, args.world)
    if not (cache / "tokenizer" / "tokenizer.json").exists():
        (cache / "tokenizer").mkdir(exist_ok=True)
        train_tokenizer(cache).save(cache / "tokenizer")
    tokenizer = Tokenizer.from_file(cache / "tokenizer" / "tokenizer.json")

    torch.manual_seed(0)
    model = CLIP(CONFIG).to(args.device, memory_format=torch.channels_last)
    model.visual.resize_positions = True
    names = [entry["name"] for entry in json.loads((cache / "classes.json").read_text())]

    def evaluate(module: nn.Module, step: int) -> dict[str, float]:
        accuracy = zero_shot_accuracy(
            module, tokenizer, args.shared / "tiny_imagenet_val.parquet", names, limit=1000, size=SIZE
        )
        print(
            f"step {step}: zero-shot top-1 {accuracy['top1']:.2f}, top-5 {accuracy['top5']:.2f}", flush=True
        )
        return accuracy

    stem_steps, photo_sizes = args.stem_steps, ((0.4, 32), (0.85, 48), (1.0, SIZE))
    train(
        model,
        StemClassifier(len(names)).to(args.device, memory_format=torch.channels_last),
        Photos(cache, steps=stem_steps, sizes=photo_sizes),
        TrainConfig(steps=stem_steps, lr=2e-3, precision="bfloat16", save_every=200, log_every=50),
        args.run / "stem",
        on_progress=report,
    )
    phases = (
        ("names", {"size": 48}, TrainConfig(steps=args.names_steps, lr=1.2e-3, lr_floor=0.3, warmup=100)),
        (
            "full",
            {"size": SIZE, "made": ("world", "clips")},
            TrainConfig(steps=args.full_steps, lr=4e-4, warmup=50, seed=2),
        ),
        (
            "last",
            {"size": SIZE, "made": ("world", "clips"), "kinds": 0.25, "coarse": 0.4},
            TrainConfig(steps=args.last_steps, lr=4e-4, warmup=50, seed=3),
        ),
    )
    prepare_clips(cache, args.clips)
    for name, options, config in phases:
        train(
            model,
            Contrastive(weight_decay=0.1),
            BuiltinData(cache, tokenizer, **({"kinds": 0.12, "smallest_crop": 0.5} | options)),
            replace(config, precision="bfloat16", save_every=100),
            args.run / name,
            on_progress=report,
            evaluate=evaluate,
            evaluate_every=200,
        )
    save(model, tokenizer, args.run / "model")


def save(model: CLIP, tokenizer: Tokenizer, folder: Path) -> None:
    """The native model folder that the package carries, at half precision."""
    model.visual.resize_positions = False
    recipe = Recipe(size=(SIZE, SIZE), mean=MEAN, std=STD)
    made = Model(
        model.float().to(memory_format=torch.contiguous_format),
        config=CONFIG.to_json(),
        recipe=recipe,
        tokenizer=tokenizer,
        name="builtin",
        device="cpu",
        licence="Apache-2.0",
    )
    made.save(folder, dtype="float16")
    print(f"saved {folder}")


if __name__ == "__main__":
    main()
