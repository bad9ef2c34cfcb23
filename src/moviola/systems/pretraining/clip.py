"""CLIP: an image tower and a text tower trained to agree on which picture goes with which sentence.

Every picture of a batch is compared with every sentence; the right pair must win its row and its
column. After training, any sentence is a classifier: the picture's label is the sentence it is
nearest to. The other systems of the house stand on this one, so its towers live in `moviola.clip`
and its loss in `moviola.training.objectives`; this file is their entry in the list of systems.

Radford, Kim, Hallacy, Ramesh, Goh, Agarwal, Sastry, Askell, Mishkin, Clark, Krueger, Sutskever:
"Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv 2103.00020.
Official code: openai/CLIP (MIT), inference only. The training recipe is the paper's Figure 3:
symmetric cross-entropy over cosine times exp(logit scale), the scale clamped to at most 100.

Known differences
- Head counts are fields of the configuration; the official code derives them as width / 64.
- Weights are kept in float32 unless a dtype is asked for; the official code casts to half on a GPU.
- Text after the last end-of-text token of a batch is cut off before the tower: exact, since
  attention is causal, and faster.
- `encode_video`, the mean of the normalised frame vectors, is ours: the paper has no videos.

Axis letters: B pictures, N texts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from moviola.clip.config import ClipConfig, TextConfig, VitConfig, rn50, vit_b_16, vit_b_32, vit_l_14
from moviola.clip.keys import Keys, Rule
from moviola.clip.model import CLIP
from moviola.data.world import Scene, picture
from moviola.metrics.classification import topk_accuracy
from moviola.training.objectives import Contrastive
from moviola.types import Claim, Example

__all__ = [
    "CLAIM",
    "CLIP",
    "KEYS",
    "Config",
    "Contrastive",
    "example",
    "rn50",
    "vit_b_16",
    "vit_b_32",
    "vit_l_14",
]

Config = ClipConfig

KEYS = Keys(Rule("{rest}", "{rest}"), ignore=("input_resolution", "context_length", "vocab_size"))
"""The house's names are OpenAI's; three numbers that its archives carry are not weights."""


def tiny() -> ClipConfig:
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2)
    return ClipConfig(16, vision, TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2))


def example(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(tiny()).eval()

    def run(pixels_BCHW: Tensor, tokens_BL: Tensor) -> dict[str, Tensor]:
        image_BD, text_BD = model.encode_image(pixels_BCHW), model.encode_text(tokens_BL)
        losses = Contrastive()(model, {"image": pixels_BCHW, "text": tokens_BL})
        return {
            "image": image_BD,
            "text": text_BD,
            "scores": model.score(text_BD, image_BD),
            "loss": losses["contrastive"],
        }

    tokens_BL = torch.randint(1, 30, (4, 8), generator=generator)
    tokens_BL[:, -1] = 31
    inputs = {"pixels_BCHW": torch.randn(4, 3, 16, 16, generator=generator), "tokens_BL": tokens_BL}
    shapes = {"image": (4, 16), "text": (4, 16), "scores": (4, 4), "loss": ()}
    return Example(run, inputs, shapes, model, ("pixels_BCHW", "tokens_BL", "image", "text"), "loss")


COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle", "cross")
_SIZE, _LENGTH = 32, 24


@lru_cache(maxsize=1)
def _made_pictures() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pictures and captions to train on; new pictures of one thing, their class, and a prompt per class."""

    def one_thing(seed: int, count: int) -> list[Scene]:
        made = (picture(seed, i, size=_SIZE, colours=COLOURS, shapes=SHAPES) for i in range(count))
        return [scene for scene in made if len(scene.things) == 1]

    scenes, later = one_thing(0, 4000), one_thing(1, 900)
    classes = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    label_N = torch.tensor([classes.index((s.things[0].colour, s.things[0].shape)) for s in later])
    captions = [scene.captions[0] for scene in scenes]
    prompts = [f"a picture of a {colour} {shape}" for colour, shape in classes]
    word_ids = {word: n for n, word in enumerate(sorted(set(" ".join(captions + prompts).split())), start=1)}

    def tokens(texts: Sequence[str]) -> Tensor:
        made_NL = torch.zeros(len(texts), _LENGTH, dtype=torch.int64)
        for row_L, text in zip(made_NL, texts, strict=True):
            ids = [word_ids[word] for word in text.split()][: _LENGTH - 1]
            row_L[: len(ids) + 1] = torch.tensor([*ids, len(word_ids) + 1])  # the largest id ends the text
        return made_NL

    def pixels(made: Sequence[Scene]) -> Tensor:
        return torch.from_numpy(np.stack([s.pixels_HWC for s in made])).permute(0, 3, 1, 2) / 127.5 - 1

    return pixels(scenes), tokens(captions), pixels(later), label_N, tokens(prompts)


def run_claim(arm: str, seed: int, *, steps: int = 300, batch: int = 64) -> dict[str, float]:
    """Train (or not) on pictures with captions, then name the one thing in new pictures by prompt alone.

    The class is the pair of colour and shape, 16 in all. `shuffled` trains as long on captions that
    were dealt to the wrong pictures: what it knows, it knows from the words and pictures alone.
    """
    pixels, tokens, new_pixels, label_N, prompts_CL = _made_pictures()
    torch.manual_seed(seed)
    if arm == "shuffled":
        tokens = tokens[torch.randperm(len(tokens))]
    vision = VitConfig(image_size=_SIZE, patch_size=8, width=64, layers=2, heads=4)
    text = TextConfig(context_length=_LENGTH, vocab_size=int(tokens.max()) + 1, width=64, layers=1, heads=4)
    model, objective = CLIP(ClipConfig(64, vision, text)), Contrastive()
    optimizer = torch.optim.AdamW(objective.param_groups(model), lr=2e-3)
    for _ in range(0 if arm == "untrained" else steps):
        rows = torch.randint(len(pixels), (batch,))
        loss = objective(model, {"image": pixels[rows], "text": tokens[rows]})["contrastive"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(model)
    model.eval()
    with torch.no_grad():
        scores_NC = model.score(model.encode_text(prompts_CL), model.encode_image(new_pixels)).T
    return {"zero-shot top-1": topk_accuracy(scores_NC.numpy(), label_N.numpy(), (1,))["top1"]}


CLAIM = Claim(
    statement="Learning which caption belongs to which picture makes a classifier of any sentence.",
    data="made world: pictures of one thing (4 colours, 4 shapes) with captions; new pictures to name",
    metric="zero-shot top-1",
    arms=("untrained", "shuffled", "clip"),
    ours="clip",
    baseline="shuffled",
    run=run_claim,
)
