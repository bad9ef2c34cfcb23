"""One task after the other: what methods that keep a CLIP from forgetting share, and the plainest of them.

A task is some classes with labelled pictures. Each method is an `Objective` that is made anew for every
task, from the model as it stands then, and `finish`ed after it: `method(model, task, **options)`. Pictures
are classified by the words of the classes, whose vectors the model makes anew at every step. Every method
is written here after its paper:

    FineTune   cross-entropy alone
    Lwf        and a frozen copy's answers over the class names: Li and Hoiem, arXiv 1606.09282

Others are in `continual_baselines`, and VR-LwF in `systems.adaptation.vr_lwf`.

Axis letters: B pictures, C classes in all, S classes that play a part, K templates, P further texts,
L tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.foreign_tokenizer import AnyTokenizer
from moviola.parts.distillation import frozen_copy
from moviola.training.objectives import BaseObjective
from moviola.types import Batch, LabelField, Needs, PictureField, Refusal, UsageError

Part = Literal["both", "image", "text"]
DECAY_AT = 2 / 3
"""The share of a run after which the rate is a tenth: the authors' 10 of 15 epochs."""


@dataclass(frozen=True)
class Words:
    """The ids a text tower reads: `size` of them, and which start, end and fill up a text."""

    size: int
    start_id: int
    end_id: int
    pad_id: int = 0

    @classmethod
    def of(cls, tokenizer: AnyTokenizer) -> Self:
        return cls(tokenizer.size, tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id)


@dataclass(frozen=True)
class Task:
    """Some of the classes, to be learned now.

    current     numbers of this task's classes; only these compete in the cross-entropy
    seen        those of all tasks up to this one
    tokens_CKL  every class's name in every template
    words       the tokenizer's ids, for methods that make texts up
    earlier     earlier(kept, size, step): a batch of `size` pictures of earlier tasks, drawn anew at each
                step from the first `kept` of each class; None where there are none
    """

    index: int
    current: tuple[int, ...]
    seen: tuple[int, ...]
    tokens_CKL: Tensor
    words: Words | None = None
    seed: int = 0
    earlier: Callable[[int, int, int], Batch] | None = None

    def __post_init__(self) -> None:
        if self.tokens_CKL.ndim != 3 or not self.tokens_CKL.numel():
            raise UsageError(
                f"Class names are tokens (classes, templates, length), got {tuple(self.tokens_CKL.shape)}."
            )
        count = len(self.tokens_CKL)
        if not self.current:
            raise UsageError(f"Task {self.index + 1} has no class.", hint="Leave it out.")
        if len(set(self.seen)) < len(self.seen) or len(set(self.current)) < len(self.current):
            raise UsageError(f"Task {self.index + 1} names a class twice: {self.current} of {self.seen}.")
        if not set(self.current) <= set(self.seen) <= set(range(count)):
            raise UsageError(
                f"Task {self.index + 1} needs classes from 0 to {count - 1}, its own among those seen, got "
                f"{self.current} of {self.seen}."
            )

    @property
    def whole(self) -> bool:
        """All classes at once: the authors' one-step mode."""
        return self.index == 0 and len(self.current) == len(self.tokens_CKL)


def lwf_kl(student_BS: Tensor, teacher_BS: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of the softmax over the columns, averaged over the rows.

    There is no factor of the squared temperature. Gradients reach the student only.
    """
    if student_BS.shape != teacher_BS.shape or student_BS.ndim != 2:
        raise UsageError(
            f"Student and teacher need logits of one shape, got {tuple(student_BS.shape)} and "
            f"{tuple(teacher_BS.shape)}."
        )
    if not temperature > 0:
        raise UsageError(f"The temperature must be positive, got {temperature}.")
    log_student = F.log_softmax(student_BS / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_BS.detach() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def image_vectors(model: nn.Module, pixels_BCHW: Tensor) -> Tensor:
    """Unit rows, float32."""
    return F.normalize(cast(Any, model).encode_image(pixels_BCHW).float(), dim=-1)


def text_vectors(
    model: nn.Module, tokens_SKL: Tensor, further_PL: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Unit rows of the classes (the mean over their templates) and of further texts, in one pass."""
    count, templates = tokens_SKL.shape[:2]
    tokens_NL = tokens_SKL.flatten(0, 1)
    if further_PL is not None:
        tokens_NL = torch.cat([tokens_NL, further_PL])
    text_ND = F.normalize(cast(Any, model).encode_text(tokens_NL).float(), dim=-1)
    class_SD = text_ND[: count * templates]
    if templates > 1:
        class_SD = F.normalize(class_SD.unflatten(0, (count, templates)).mean(1), dim=-1)
    return class_SD, text_ND[count * templates :]


def scale_of(model: nn.Module) -> Tensor:
    """The factor from cosine to logit."""
    return cast(Tensor, model.logit_scale).exp()


def choose_parameters(model: nn.Module, part: Part, above: int | None) -> list[str]:
    """Names of the parameters to train; all others are frozen. Parameters that were frozen stay so.

    part   both towers, or one of them; the logit scale trains with each
    above  only blocks whose number is larger, and what follows the blocks (the last norm, the projection)
    """
    if part not in ("both", "image", "text"):
        raise UsageError(f"part is both, image or text, got {part!r}.")
    if above is not None and above < 0:
        raise UsageError(f"above is the number of a block, 0 or more, got {above}.")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    image = {name for name in names if name.startswith("visual.")}
    if part != "both" and not image:
        raise Refusal(
            "This model does not keep its image tower apart, so part of it cannot be trained alone.",
            hint="Use part='both'.",
        )
    towers = {"both": set(names), "image": image, "text": set(names) - image}[part] | {"logit_scale"}
    chosen = [name for name in names if name in towers and (above is None or _lies_above(name, above))]
    if above is not None and not any(".resblocks." in f".{name}" for name in chosen):
        raise UsageError(f"The model has no block above number {above}.", hint="Blocks count from 0.")
    kept = set(chosen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept)
    return chosen


_AFTER_BLOCKS = ("ln_final.", "text_projection", "logit_scale", "visual.ln_post.", "visual.proj")


def _lies_above(name: str, above: int) -> bool:
    _, found, rest = f".{name}".partition(".resblocks.")
    return int(rest.split(".")[0]) > above if found else name.startswith(_AFTER_BLOCKS)


class FineTune(BaseObjective):
    """Cross-entropy of the pictures over this task's class names: what the others are compared with.

    Adam without weight decay; the rate is constant, and a tenth after two thirds of the steps where all
    classes are learned at once, as the authors of VR-LwF have it. Only texts that play a part are
    encoded: a column that a mask keeps out has neither value nor gradient. BatchNorm keeps the statistics
    it has: those of a few classes would shift every other picture, and student and teacher would differ
    from the start. `steps_done` is in the checkpoint, so that what is drawn at a step does not depend on
    kills. A method writes `losses`.
    """

    scope: Literal["pair", "token", "local"] = "local"
    needs = Needs((PictureField(), LabelField()))

    def __init__(
        self, model: nn.Module, task: Task, *, part: Part = "both", above: int | None = None
    ) -> None:
        super().__init__()
        self.task = task
        self.trained = choose_parameters(model, part, above)
        self.steps_done: Tensor
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.long))
        self.columns = self.competing()
        place_C = torch.full((len(task.tokens_CKL),), -1)
        place_C[list(task.current)] = torch.arange(len(task.current))
        own_S = torch.tensor([self.columns.index(number) for number in task.current])
        for name, value in (
            ("_tokens_SKL", task.tokens_CKL[list(self.columns)]),
            ("_place_C", place_C),
            ("_own_S", own_S),
        ):
            self.register_buffer(name, value.to(_device(model)), persistent=False)

    def competing(self) -> tuple[int, ...]:
        """The classes whose logits are needed, this task's among them."""
        return self.task.current

    @property
    def tokens_SKL(self) -> Tensor:
        return cast(Tensor, self._tokens_SKL)

    def cross_entropy(self, logits_BS: Tensor, label_B: Tensor) -> Tensor:
        """Over this task's columns alone; raises `UsageError` for a picture of another task."""
        place_B = cast(Tensor, self._place_C)[label_B]
        if bool((place_B < 0).any()):
            foreign = label_B[place_B < 0].unique().tolist()
            raise UsageError(
                f"Task {self.task.index + 1} has the classes {self.task.current}, but pictures of {foreign} "
                "came with it."
            )
        return F.cross_entropy(logits_BS[:, cast(Tensor, self._own_S)], place_B)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        text_SD, _ = text_vectors(model, self.tokens_SKL)
        logits_BS = scale_of(model) * image_vectors(model, batch["image"]) @ text_SD.T
        return {"cross_entropy": self.cross_entropy(logits_BS, batch["label"])}

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self.losses(model, batch)

    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        parameters = dict(model.named_parameters())
        return [{"params": [parameters[name] for name in self.trained], "weight_decay": 0.0}]

    def lr_factors(self, step: int, steps: int) -> Sequence[float] | None:
        return [0.1 if self.task.whole and step >= math.ceil(DECAY_AT * steps) else 1.0]

    def after_step(self, model: nn.Module) -> None:
        self.steps_done += 1

    def finish(self, model: nn.Module) -> None:
        """After the task's last step: what the method does to the weights then."""


class Taught(FineTune):
    """A method with a frozen copy of the model as it was before the task.

    The copy is no part of the checkpoint: a run that goes on makes it again from the same weights.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        teacher: nn.Module | None = None,
        *,
        alpha: float = 0.5,
        part: Part = "both",
        above: int | None = None,
    ) -> None:
        super().__init__(model, task, part=part, above=above)
        if not (math.isfinite(alpha) and alpha >= 0):
            raise UsageError(f"alpha must not be negative, got {alpha}.", hint="The authors use 0.5.")
        mine = {id(parameter) for parameter in model.parameters()}
        if teacher is not None and any(id(parameter) in mine for parameter in teacher.parameters()):
            raise UsageError(
                "The teacher shares its weights with the model, so it would say whatever the model says.",
                hint="Leave the teacher out, or copy it: copy.deepcopy(model).",
            )
        self.alpha = alpha
        self._teacher = (frozen_copy(model) if teacher is None else teacher,)  # a tuple: no submodule

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]


class Lwf(Taught):
    """Learning without forgetting: the frozen copy's answers over the names of the classes seen so far.

    alpha * KL(teacher || student) over these classes is added. Stored pictures are not needed: those of
    the new task carry the old model's answers.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        teacher: nn.Module | None = None,
        *,
        alpha: float = 0.5,
        temperature: float = 1.0,
        part: Part = "both",
        above: int | None = None,
    ) -> None:
        super().__init__(model, task, teacher, alpha=alpha, part=part, above=above)
        self.temperature = temperature
        with torch.no_grad():
            self.register_buffer(
                "_taught_SD", text_vectors(self.teacher, self.tokens_SKL)[0], persistent=False
            )

    def competing(self) -> tuple[int, ...]:
        return self.task.seen

    @torch.no_grad()
    def teacher_logits(self, pixels_BCHW: Tensor, further_PD: Tensor | None = None) -> Tensor:
        """The teacher's logits over the classes that play a part, and over further texts where given."""
        text_ND = cast(Tensor, self._taught_SD)
        if further_PD is not None:
            text_ND = torch.cat([text_ND, further_PD])
        return scale_of(self.teacher) * image_vectors(self.teacher, pixels_BCHW) @ text_ND.T

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        text_SD, _ = text_vectors(model, self.tokens_SKL)
        logits_BS = scale_of(model) * image_vectors(model, batch["image"]) @ text_SD.T
        kept = lwf_kl(logits_BS, self.teacher_logits(batch["image"]), self.temperature)
        return {"cross_entropy": self.cross_entropy(logits_BS, batch["label"]), "lwf": self.alpha * kept}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
