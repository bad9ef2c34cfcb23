"""`recognise`: a video encoder fine-tuned to name classes of clips, measured before and after.

Axis letters: N clips, C classes, L tokens.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal, cast

import torch

from moviola.clip.loaded import Model, choose_device
from moviola.data.action_lists import Layout
from moviola.data.class_clips import CROP_AREA, ClassClips
from moviola.data.classes import ClassSet, Names
from moviola.data.rows.clips import FRAMES
from moviola.data.rows.feed import feed
from moviola.data.templates import read_templates
from moviola.files import atomic
from moviola.systems.registry import all_systems, entry_module, find
from moviola.training.checkpoint import CHECKPOINT, read_metrics
from moviola.training.config import TrainConfig
from moviola.training.loop import SKIPPED
from moviola.training.loop import Progress as Logged
from moviola.training.loop import train as run_loop
from moviola.training.recognition import Recognition
from moviola.types import Refusal, Training, UsageError, printable
from moviola.verbs.adapt_train import configuration
from moviola.verbs.classify import refuse_without_words
from moviola.verbs.common import Progress, Skipped, summary
from moviola.verbs.load import load
from moviola.verbs.recognise_data import Source, mirrors_badly, protocol
from moviola.verbs.recognise_measure import Measure
from moviola.verbs.train import MODEL, RUN, last_losses
from moviola.verbs.train_report import draw
from moviola.verbs.train_start import as_started, new_model
from moviola.verbs.views import Views

PLAIN = Training(
    Recognition,
    recipe={"lr": 8e-6, "betas": (0.9, 0.98), "eps": 1e-8, "lr_floor": 0.01, "template": "a photo of a {}."},
)
"""`clip`: every weight of a CLIP, whose video is the mean of its frames, by the recipe of ViFi-CLIP."""
_MOST_BATCH = 32  # clips of a step where nothing else is said; the papers' 256 are for eight GPUs
_OWN_FIELDS = (
    "template",
    "crop_area",
    "flip",
    "frames",
)  # of a recipe, besides those of `TrainConfig` and `epochs`


@dataclass(frozen=True)
class RecognitionReport:
    """What a run learned. Figures are percent on clips it did not learn from, by the same views.

    before, after     `top-1`, `top-5` (of more than five classes) and `mean per class`; with base and new
                      classes `base`, `new` and `harmonic mean`. `before` is the model as it started
    per_class         top-1 by class, after; `per_class_before` before
    skipped           clips that broke in training and were replaced (`skipped.jsonl`)
    """

    folder: Path
    model: Path
    objective: str
    classes: tuple[str, ...]
    learned_from: int
    measured_on: int
    steps: int
    losses: dict[str, float]
    before: dict[str, float]
    after: dict[str, float]
    per_class_before: dict[str, float]
    per_class: dict[str, float]
    skipped: int = 0
    failed: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        def rounded(values: Mapping[str, float]) -> dict[str, float]:
            return {name: round(value, 4) for name, value in values.items()}

        return {
            "run": str(self.folder),
            "model": str(self.model),
            "objective": self.objective,
            "classes": list(self.classes),
            "learned_from": self.learned_from,
            "measured_on": self.measured_on,
            "steps": self.steps,
            "losses": self.losses,
            "before": rounded(self.before),
            "after": rounded(self.after),
            "per_class_before": rounded(self.per_class_before),
            "per_class": rounded(self.per_class),
            "skipped": self.skipped,
            "failed": [one.to_json() for one in self.failed],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        losses = ", ".join(f"{name} {value:.4f}" for name, value in self.losses.items())
        lines = [
            f"{self.objective}: {self.steps} steps over {self.learned_from} clips of {len(self.classes)} "
            f"classes, measured on {self.measured_on} others; {losses}."
        ]
        lines += [
            f"{name}: "
            + (f"{self.before[name]:.1f} before, " if name in self.before else "")
            + f"{value:.1f} after"
            for name, value in self.after.items()
        ]
        if self.skipped:
            lines.append(f"{self.skipped} clips broke and were replaced: {printable(self.folder / SKIPPED)}")
        lines += [*self.notes, *summary(self.failed, "could not be read")]
        return "\n".join([*lines, f"Model: {printable(self.model)}"])


def recognise(
    data: str | Path | ClassSet,
    to: str | Path,
    *,
    objective: str = "vifi-clip",
    options: Mapping[str, Any] | None = None,
    init: str | Path | Model = "builtin",
    model: str | None = None,
    test: str | Path | ClassSet | None = None,
    shots: int | None = None,
    base_to_new: bool = False,
    templates: str | Path | Sequence[str] | None = None,
    layout: Layout | None = None,
    split: str | None = None,
    fold: int = 1,
    names: Names | None = None,
    media_root: str | Path | None = None,
    label_column: str | None = None,
    media_column: str | None = None,
    held_out: float = 0.2,
    most_test: int | None = None,
    views: tuple[int, int] = (4, 3),
    measure_every: int | None = None,
    frames: int | None = None,
    crop_area: tuple[float, float] | None = None,
    flip: float | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    lr: float | None = None,
    warmup: int | None = None,
    keep_statistics: bool | None = None,
    precision: Literal["float32", "bfloat16"] | None = None,
    workers: int = 0,
    seed: int = 0,
    device: str = "auto",
    tokenizer: str | Path | None = None,
    on_progress: Progress | None = None,
) -> RecognitionReport:
    """Fine-tune a video encoder on clips by class: a folder per class, a table, or a benchmark's own list.

    >>> moviola.recognise("actions/", "run", objective="x-clip", shots=16)      # doctest: +SKIP

    data        a folder per class (or `train/` and `val/` of them), a table (`read_classes`), or a list of
                Kinetics, UCF101, HMDB51 or Something-Something V2 (`read_actions`)
    objective   a system with `RECOGNITION`, or `clip`: a CLIP with the mean of its frames
    init        the model to start from; the caller's stays as it is
    model       a new model instead: a preset of the system, for encoders that learn without words
    test        other clips with the same class names to measure on; else a share `held_out` of each class
    shots       clips of each class to learn from, drawn by hash of `seed`; the others are measured on
    base_to_new learn the half of the classes with the most clips, measure both halves among their own names
    templates   the sentence that class names stand in; default the system's own. Of several, training takes
                the first and measuring the mean
    views       (clips, crops) of a video when it is measured
    frames      frames of a clip where the model takes any number; default the system's own, or 8
    flip        chance of mirroring; default 1/2, or none where a class is called left or right
    keep_statistics  whether BatchNorm keeps the statistics it came with; default: where `init` has words

    `to` is the run's folder: `model/` is the trained model, `metrics.jsonl` the losses and figures,
    `losses.png` the curves, `checkpoint.pt` what the same call goes on from after a kill. Raises `UsageError`
    for sets that cannot be told apart and settings that cannot be meant, `Refusal` for models without words.
    """
    slug, training = recognition_of(objective)
    if base_to_new and not getattr(training.objective, "words", True):
        raise Refusal(
            f"{slug} learns a classifier without words, which cannot name classes that it never saw.",
            hint="Leave base_to_new out, or use an encoder with text: x-clip, vifi-clip ...",
        )
    source = Source(layout, split, fold, names, media_root, label_column, media_column)
    train, other = source.read_both(data, test)
    seen = Views(*views)
    begun = _start(slug, training, init, model, tokenizer, seed)
    asked = protocol(
        train,
        other,
        begun.frame_spec,
        shots=shots,
        base_to_new=base_to_new,
        held_out=held_out,
        most_test=most_test,
        seed=seed,
    )
    notes = [*asked.notes]
    recipe = dict(training.recipe)
    own = {name: recipe.pop(name) for name in _OWN_FIELDS if name in recipe}
    frames = frames or int(own.get("frames", FRAMES))
    sentences = read_templates(own.get("template", "{}") if templates is None else templates)
    sided = mirrors_badly(asked.data.classes)
    if flip is None:
        flip = 0.0 if sided else float(own.get("flip", 0.5))
        if sided:
            notes.append(f"Clips are not mirrored: class names say which side ({', '.join(sided[:3])}).")
    aim = _objective(training, begun, asked.data.classes, sentences[0], dict(options or {}), slug, seed)
    clips = ClassClips(
        asked.data,
        asked.rows,
        aim.needs,
        recipe=begun.recipe,
        frame_spec=begun.frame_spec,
        frames=frames,
        crop_area=crop_area or own.get("crop_area", CROP_AREA),
        flip=flip,
        opened=True,
    )
    recipe["batch_size"] = min(
        int(recipe.get("batch_size", _MOST_BATCH)), _MOST_BATCH, max(2, len(clips) // 4)
    )
    settings = {
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "lr": lr,
        "warmup": warmup,
        "keep_statistics": begun.has_text if keep_statistics is None else keep_statistics,
        "precision": precision,
    }
    config = configuration(recipe, settings, len(clips), seed)
    if warmup is None:
        config = replace(config, warmup=min(int(recipe.get("warmup", config.steps)), config.steps // 10))
    folder = Path(to)
    told = json.dumps([list(asked.data.classes), sentences, {k: str(v) for k, v in (options or {}).items()}])
    identity = {
        "objective": slug,
        "model": f"{begun.system} {begun.name} ({begun.hash})",
        "classes and options": hashlib.sha256(told.encode()).hexdigest()[:16],
        "data": clips.fingerprint,
    }
    _describe(folder, data, identity, config, {"views": views, "shots": shots, "base_to_new": base_to_new})
    place = choose_device(device)
    module = begun.module.to(place)
    measure = Measure(folder, begun, asked, sentences, seen, frames, place, on_progress)

    def tell(logged: Logged) -> None:
        if on_progress is not None:
            losses = ", ".join(f"{name} {value:.3f}" for name, value in logged.losses.items())
            on_progress(logged.step, logged.steps, f"{losses}, {logged.rows_per_second:.1f} clips/s")

    run_loop(
        module,
        aim,
        clips,
        config,
        folder,
        identity=identity,
        feed=lambda rows, ahead, key: feed(rows, ahead, seed=key, workers=workers),
        on_progress=tell,
        evaluate=measure if asked.tasks else None,
        evaluate_every=measure_every or config.steps,
    )
    if asked.tasks and str(config.steps) not in measure.read():
        measure(module, config.steps)  # a finished run is asked for other views or clips
    for parameter in module.parameters():
        parameter.grad = None
    name = f"{begun.name} trained by {slug}"
    begun.around(module, name=name, classes=asked.data.classes).save(folder / MODEL)
    metrics = read_metrics(folder)
    notes += draw(metrics, folder / "losses.png")
    if not asked.tasks:
        notes.append(
            "Nothing was left to measure on: name other clips (--test), or hold out more (--held-out)."
        )
    found = measure.read()
    first, last = found.get("0", {}), found.get(str(config.steps), {})
    skipped = folder / SKIPPED
    return RecognitionReport(
        folder=folder,
        model=folder / MODEL,
        objective=slug,
        classes=asked.data.classes,
        learned_from=len(clips),
        measured_on=int(last.get("clips", 0)),
        steps=config.steps,
        losses=last_losses(metrics),
        before=first.get("figures", {}),
        after=last.get("figures", {}),
        per_class_before=first.get("per_class", {}),
        per_class=last.get("per_class", {}),
        skipped=len(skipped.read_text().splitlines()) if skipped.exists() else 0,
        failed=(*asked.failed, *(Skipped(*one) for one in last.get("failed", ()))),
        notes=tuple(notes),
    )


# --------------------------------------------------------------------------------------------------
# What is trained
# --------------------------------------------------------------------------------------------------


def recognition_of(name: str) -> tuple[str, Training]:
    """How an objective of this name trains: `clip`, or the `RECOGNITION` of a system by slug or number."""
    if name == "clip":
        return name, PLAIN
    system = find(name)
    training = getattr(entry_module(system), "RECOGNITION", None)
    if training is None:
        others = [s.slug for s in all_systems() if hasattr(entry_module(s), "RECOGNITION")]
        raise Refusal(
            f"{system.slug} ({system.title}) is not trained to name classes of clips.",
            hint=f"These are: {', '.join(['clip', *others])}.",
        )
    return system.slug, training


def _start(
    slug: str,
    training: Training,
    init: str | Path | Model,
    model: str | None,
    tokenizer: str | Path | None,
    seed: int,
) -> Model:
    """The model to train, on the CPU, in float32; nothing of the caller's is in it."""
    words = getattr(training.objective, "words", True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # new parts are the same in every call
        if model is not None:
            if init != "builtin":
                raise UsageError("Give init, a model to go on from, or model, a new one; not both.")
            return new_model(model, slug, training, tokenizer)
        base = init if isinstance(init, Model) else load(init, device="cpu", tokenizer=tokenizer)
        if words:
            refuse_without_words(base, "recognition")
            if base.tokenizer is None:
                raise UsageError(
                    f"The model '{base.name}' has no tokenizer.", hint="Name its file with --tokenizer."
                )
        elif not hasattr(base.module, "set_classes"):
            raise Refusal(
                f"{slug} trains a video encoder of its own, and the model '{base.name}' is none.",
                hint=f"Name a new one (--model {next(iter(training.presets), 'PRESET')}), or one that "
                "`moviola train` made (--init FOLDER).",
            )
        if isinstance(init, Model):
            base = copy.copy(base)
            base.module = copy.deepcopy(init.module).to("cpu", torch.float32)
        return as_started(base, training, slug, base={"name": base.name, "hash": base.hash})


def _objective(
    training: Training,
    model: Model,
    classes: Sequence[str],
    template: str,
    options: dict[str, Any],
    slug: str,
    seed: int,
) -> Any:
    made = training.objective
    known: set[str] = set()
    for one in [made, *(getattr(made, "__mro__", ()))]:  # options are handed on to the classes above
        taken = signature(one).parameters.values()
        known |= {p.name for p in taken if p.kind is Parameter.KEYWORD_ONLY}
        if not any(p.kind is Parameter.VAR_KEYWORD for p in taken):
            break
    unknown = sorted(set(options) - known)
    if unknown:
        raise UsageError(
            f"The objective {slug} has no option {', '.join(unknown)}.",
            hint=f"It has: {', '.join(sorted(known - {'tokenizer'}))}.",
        )
    if "tokenizer" in known:  # an objective that takes words apart
        options = {"tokenizer": model.tokenizer, **options}
    tokens_CL = torch.zeros(len(classes), 1, dtype=torch.long)
    if getattr(made, "words", True):
        assert model.tokenizer is not None
        tokens_CL = torch.from_numpy(model.tokenizer([template.replace("{}", name) for name in classes]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        aim = made(model.module, tokens_CL, **options)
    model.config = dict(cast(Any, model.module).config.to_json())  # the objective may have set a head
    return aim


def _describe(
    folder: Path, data: Any, identity: Mapping[str, str], config: TrainConfig, about: Mapping[str, Any]
) -> None:
    """`run.json`: what was asked for. Refuses a folder that holds anything but a run."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RUN).is_file():
        raise UsageError(
            f"{printable(folder)} holds other files: it is no run's folder.",
            hint="Name a new folder with --to.",
        )
    if not (folder / CHECKPOINT).exists():
        source = str(data.source) if isinstance(data, ClassSet) else str(data)
        told = {"task": "recognition", "data": source, **about, "config": vars(config), "identity": identity}
        with atomic(folder / RUN) as file:
            file.write(json.dumps(told, indent=1).encode("utf-8", "replace"))
