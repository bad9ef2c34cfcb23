"""VR-LwF: keep a CLIP's open vocabulary by asking it, and its former self, about random sentences.

Fine-tuned on a few classes, CLIP forgets others, since their words no longer occur. Learning without
forgetting replays what a frozen copy says of the new pictures, but only over the class names. VR-LwF draws
sentences of random tokens at every step and holds the softmax over those to the copy's: they stand for the
unknown vocabulary of the pre-training, and no stored data is needed.

Ding, Liu, Tian, Yang, Ding: "Don't Stop Learning: Towards Continual Learning for the CLIP Model", 2022,
arXiv 2207.09248. Official code: yxding95/CL-CLIP (MIT), where the method is called `vrd`.

Symbols: Z_0 are the teacher's logits of the batch over the pseudo sentences, Z the student's, both with their
own pictures, texts and logit scales. L_vr = KL(softmax Z_0 || softmax Z), L_lwf the same over the names of
the classes seen so far. All classes at once: L = CE + alpha L_vr. One task after the other:
L = CE + alpha (L_lwf + L_vr), with L_lwf from the second task on and the cross-entropy over the task's own
classes. Before each task the teacher becomes a copy of the model.

Known differences
- Columns that play no part are left out; the official code encodes all and fills with -1e4: equal values and
  gradients. Texts are cut after their end token before the tower, which is equal too.
- The official draw leaves out the id before the start token as well (its upper end is exclusive); kept where
  the last two ids are start and end. With other tokenizers every id but start, end and a padding id that is
  not 0 can come.
- Sentences hash (seed, task, step): a resumed run draws the same ones. Officially the global generator.
- BatchNorm keeps its statistics while a task is learned; the authors' ViT-B/32 has none.
- Gradients are clipped without mixed precision's scale; the official code clips scaled ones.
- The official classes must divide into equal groups, or its last ones are dropped; here that is an error.
- Its one-step runs divide the rate by 10 every 10 epochs of 15, here after two thirds of the steps.
- Equation numbers are not cited: this file was written from the official code, not from the paper.

Axis letters: B pictures, C classes in all, S classes that play a part, K templates, P pseudo sentences,
L tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.keys import Keys, Rule
from moviola.clip.model import CLIP
from moviola.data import still_lifes as world
from moviola.data.hashing import hash_uint64
from moviola.metrics.classification import topk_accuracy
from moviola.training.brief import fit
from moviola.training.continual import (
    FineTune,
    Lwf,
    Part,
    Task,
    Words,
    image_vectors,
    lwf_kl,
    scale_of,
    text_vectors,
)
from moviola.training.continual_baselines import AGem, GeoDl, Imm, Rkr
from moviola.training.objectives import Contrastive
from moviola.types import Adaptation, Batch, Claim, Example, UsageError

_DRAW = 0x5EAF


@dataclass(frozen=True)
class Config:
    """The authors' values.

    n_pseudo       sentences drawn at a step
    pseudo_length  tokens of each, start and end among them
    alpha          weight of the two distillations
    part           the towers that train: both (officially wm), image (io) or text (to)
    above          train only blocks with a larger number and what follows them; None: all
    """

    n_pseudo: int = 100
    pseudo_length: int = 10
    alpha: float = 0.5
    temperature: float = 1.0
    part: Part = "both"
    above: int | None = None

    def __post_init__(self) -> None:
        if self.n_pseudo < 2:
            raise UsageError(
                f"n_pseudo must be at least 2, got {self.n_pseudo}: a softmax over one sentence is always 1."
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**data)


def pseudo_sentences(
    count: int,
    length: int,
    words: Words,
    context_length: int = 77,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sentences of random tokens (count, context_length): start, `length` - 2 random ids, end, padding.

    The ids never hold start or end, so a tower that pools at the largest id or at the first end finds the
    last place in both cases.
    """
    if count < 1:
        raise UsageError(f"There must be at least one pseudo sentence, got {count}.")
    if not 3 <= length <= context_length:
        raise UsageError(
            f"A pseudo sentence has 3 to {context_length} tokens, start and end among them, got {length}."
        )
    start, end, size = words.start_id, words.end_id, words.size
    if start == end or not (0 <= start < size and 0 <= end < size):
        raise UsageError(
            f"Start and end must be two different ids of {size}, got {start} and {end}.",
            hint="Give the tokenizer that belongs to this model.",
        )
    if (start, end) == (size - 2, size - 1) and words.pad_id == 0:
        usable = torch.arange(max(0, start - 1))
    else:
        barred = {start, end} | ({words.pad_id} if words.pad_id else set())
        usable = torch.tensor([number for number in range(size) if number not in barred])
    if not len(usable):
        raise UsageError(f"A vocabulary of {size} ids has none left to draw.")
    made_PL = torch.full((count, context_length), words.pad_id)
    made_PL[:, :length] = usable[torch.randint(len(usable), (count, length), generator=generator)]
    made_PL[:, 0], made_PL[:, length - 1] = start, end
    return made_PL


class VrLwf(Lwf):
    """One task by VR-LwF: cross-entropy, and a frozen copy's answers over random sentences.

    From the second task on its answers over the class names seen so far, too. Losses by name:
    `cross_entropy`, `replayed`, `lwf`, the last two weighed by alpha.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        teacher: nn.Module | None = None,
        *,
        n_pseudo: int = 100,
        pseudo_length: int = 10,
        alpha: float = 0.5,
        temperature: float = 1.0,
        part: Part = "both",
        above: int | None = None,
    ) -> None:
        self.config = Config(n_pseudo, pseudo_length, alpha, temperature, part, above)
        super().__init__(model, task, teacher, alpha=alpha, temperature=temperature, part=part, above=above)
        self.words = _checked(task.words, model)
        self.sentences()

    def competing(self) -> tuple[int, ...]:
        return self.task.seen if self.task.index else self.task.current

    def sentences(self) -> Tensor:
        """This step's pseudo sentences (P, L), on the CPU."""
        number = np.array([int(self.steps_done)], np.uint64)
        seed = int(hash_uint64(self.task.seed, number, _DRAW + self.task.index)[0] >> np.uint64(2))
        config, context = self.config, self.tokens_SKL.shape[-1]
        generator = torch.Generator().manual_seed(seed)
        return pseudo_sentences(config.n_pseudo, config.pseudo_length, self.words, context, generator)

    def terms(self, model: nn.Module, batch: Batch, pseudo_PL: Tensor) -> dict[str, Tensor]:
        """The losses by themselves, not weighed."""
        classes, pixels_BCHW = len(self.columns), batch["image"]
        class_SD, pseudo_PD = text_vectors(model, self.tokens_SKL, pseudo_PL)
        text_ND = torch.cat([class_SD, pseudo_PD])
        mine_BN = scale_of(model) * image_vectors(model, pixels_BCHW) @ text_ND.T
        with torch.no_grad():
            _, taught_PD = text_vectors(self.teacher, self.tokens_SKL[:0], pseudo_PL)
        taught_BN = self.teacher_logits(pixels_BCHW, taught_PD)
        losses = {
            "cross_entropy": self.cross_entropy(mine_BN[:, :classes], batch["label"]),
            "replayed": lwf_kl(mine_BN[:, classes:], taught_BN[:, classes:], self.temperature),
        }
        if self.task.index:
            losses["lwf"] = lwf_kl(mine_BN[:, :classes], taught_BN[:, :classes], self.temperature)
        return losses

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        terms = self.terms(model, batch, self.sentences().to(self.tokens_SKL.device))
        return {name: loss if name == "cross_entropy" else self.alpha * loss for name, loss in terms.items()}


def _checked(words: Words | None, model: nn.Module) -> Words:
    """The tokenizer's ids, where the tower finds the end of a text by them."""
    if words is None:
        raise UsageError("VR-LwF makes sentences up, so the task must say which words there are.")
    text = getattr(model, "text_config", None)
    if text is not None and text.eot_id is None and words.end_id != words.size - 1:
        raise UsageError(
            f"The text tower pools at the largest id, but the end id is {words.end_id} of {words.size}.",
            hint="Give the tokenizer that belongs to this model.",
        )
    if text is not None and text.eot_id is not None and words.end_id != text.eot_id:
        raise UsageError(f"The text tower pools at id {text.eot_id}, but the end id is {words.end_id}.")
    return words


KEYS = Keys(Rule("{rest}", "{rest}"))
"""The authors' model is OpenAI's CLIP, whose parameter names are the house's."""


def tiny() -> ClipConfig:
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2)
    return ClipConfig(16, vision, TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2))


def _tiny_clip(seed: int) -> CLIP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(tiny()).eval()


def example(seed: int) -> Example:
    """The second of two tasks of three classes; the teacher is another tiny CLIP."""
    generator = torch.Generator().manual_seed(seed)
    model, words = _tiny_clip(seed), Words(32, 30, 31)
    names_CL = pseudo_sentences(6, 5, words, 8, torch.Generator().manual_seed(1))
    task = Task(1, (3, 4, 5), tuple(range(6)), names_CL.unsqueeze(1), words)
    method = VrLwf(model, task, _tiny_clip(99), n_pseudo=12, pseudo_length=6)

    def run(pixels_BCHW: Tensor, label_B: Tensor) -> dict[str, Tensor]:
        text_SD, _ = text_vectors(model, method.tokens_SKL)
        losses = method(model, {"image": pixels_BCHW, "label": label_B})
        return {
            "logits": scale_of(model) * image_vectors(model, pixels_BCHW) @ text_SD.T,
            "replayed": losses["replayed"],
            "loss": torch.stack(list(losses.values())).sum(),
        }

    pixels_BCHW = torch.randn(4, 3, 16, 16, generator=generator)
    inputs = {"pixels_BCHW": pixels_BCHW, "label_B": torch.tensor([3, 4, 5, 3])}
    shapes = {"logits": (4, 6), "replayed": (), "loss": ()}
    return Example(run, inputs, shapes, model, ("pixels_BCHW", "label_B", "logits"), "loss")


ADAPTATION = Adaptation(
    sequence={
        "vr-lwf": VrLwf,
        "lwf": Lwf,
        "fine-tune": FineTune,
        "imm": Imm,
        "geodl": GeoDl,
        "a-gem": AGem,
        "rkr": Rkr,
    },
    recipe={
        "lr": 1e-6,
        "batch_size": 100,
        "epochs": 15,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "clip_grad": 1.0,
        "warmup": 0,
    },
)


@lru_cache(maxsize=3)
def _started(seed: int, pairs: int, steps: int, batch: int) -> CLIP:
    """The CLIP that all arms go on from: it knows things and faint features from captions."""
    scenes = world.still_lifes(seed, pairs)
    data = {"image": scenes.images_NCSS, "text": world.captions(scenes, seed, named=0.5)}
    model = world.small_clip(seed)
    fit(model, Contrastive(model), data, steps=steps, batch=batch, lr=2e-3, seed=seed)
    return model


def _accuracy(model: CLIP, images_NCSS: Tensor, prompts: list[str], labels_N: np.ndarray) -> float:
    with torch.no_grad():
        scores_CN = model.score(model.encode_text(world.tokens(prompts)), model.encode_image(images_NCSS))
    return topk_accuracy(scores_CN.T.numpy(), labels_N, (1,))["top1"]


def _figures(model: CLIP, seed: int, tuned: np.ndarray) -> tuple[float, float]:
    """Accuracy on new pictures of the tuned things among themselves, and the mean over what was untouched:
    the other things among themselves, and the four faint features.
    """
    new, prompts = world.still_lifes(seed, 3000, split=1), world.prompts()
    things = len(prompts["thing"])
    found = []
    for numbers in (tuned, np.setdiff1d(np.arange(things), tuned)):
        rows = np.flatnonzero(np.isin(new.thing_N, numbers))
        named = [prompts["thing"][number] for number in numbers]
        labels_N = np.searchsorted(numbers, new.thing_N[rows])
        found.append(_accuracy(model, new.images_NCSS[rows], named, labels_N))
    faint = [_accuracy(model, new.images_NCSS, prompts[name], new.labels[name]) for name in world.FAINT]
    return found[0], float(np.mean([found[1], *faint]))


_ARMS: dict[str, type[FineTune]] = {"fine-tune": FineTune, "lwf": Lwf, "vr-lwf": VrLwf}


def run_claim(
    arm: str,
    seed: int,
    *,
    start: int = 350,
    steps: int = 100,
    batch: int = 48,
    pairs: int = 8000,
    lr: float = 1e-3,
) -> dict[str, float]:
    """Fine-tune a CLIP of still lifes on ten of its 80 things, all at once, by one arm.

    Captions begin with "a", which stands for the start token of the pseudo sentences.
    """
    young = _started(seed, pairs, start, 96)
    tuned = np.sort(np.random.default_rng(seed).choice(80, 10, replace=False))
    scenes = world.still_lifes(seed, 12 * pairs // 10, split=2)
    rows = np.flatnonzero(np.isin(scenes.thing_N, tuned))[:600]
    data = {
        "image": scenes.images_NCSS[rows],
        "label": torch.from_numpy(np.searchsorted(tuned, scenes.thing_N[rows])),
    }
    names_CL = world.tokens([world.prompts()["thing"][number] for number in tuned])
    every = tuple(range(len(tuned)))
    words = Words(world.vocabulary_size(), int(world.tokens(["a"])[0, 0]), world.END_OF_TEXT)
    task = Task(0, every, every, names_CL.unsqueeze(1), words, seed)
    model = copy.deepcopy(young)
    fit(model, _ARMS[arm](model, task), data, steps=steps, batch=batch, lr=lr, seed=seed + 1)
    learned, kept = _figures(model, seed, tuned)
    learned_before, kept_before = _figures(young, seed, tuned)
    return {
        "mean of tuned and untouched, top-1": (learned + kept) / 2,
        "tuned, top-1": learned,
        "untouched, top-1": kept,
        "tuned before": learned_before,
        "untouched before": kept_before,
    }


CLAIM = Claim(
    statement="Random sentences keep what fine-tuning forgets; the names of the tuned classes keep less.",
    data="still lifes: ten of 80 things tuned; the other things and four faint features untouched",
    metric="mean of tuned and untouched, top-1",
    arms=tuple(_ARMS),
    ours="vr-lwf",
    baseline="lwf",
    run=run_claim,
)
