"""What a run trains: the model it starts from, and the objective it trains towards.

A module of its own, so that `train` reads as the sequence of what it does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from moviola.clip.config import ClipConfig, TextConfig, VitConfig, rn50, vit_b_16, vit_b_32, vit_l_14
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.clip.native import read_json
from moviola.systems.registry import all_systems, entry_class, entry_module, find
from moviola.training.combined import WeightedSum
from moviola.training.objectives import Contrastive, SigLip
from moviola.types import Objective, PairObjective, Recipe, Refusal, Training, UsageError, printable
from moviola.verbs.load import BUILTIN, load, recipe_of

if TYPE_CHECKING:
    from moviola.verbs.train_run import TrainRun

PRESETS: dict[str, Callable[[], ClipConfig]] = {
    "tiny": lambda: ClipConfig(
        128,
        VitConfig(image_size=64, patch_size=8, width=128, layers=4, heads=4, stem=((32, 0), (64, 1))),
        TextConfig(width=128, layers=3, heads=4),
        "gelu",
    ),
    "vit-b-32": vit_b_32,
    "vit-b-16": vit_b_16,
    "vit-l-14": vit_l_14,
    "rn50": rn50,
}
"""Configurations of new CLIPs for `--model`; systems add their own."""

_PLAIN = {
    "clip": Training(Contrastive, recipe={"betas": (0.9, 0.98)}),
    "siglip": Training(SigLip, recipe={"betas": (0.9, 0.95)}),
}


@dataclass
class Start:
    """What training begins with. `new` says that the weights are new ones."""

    model: Model
    objective: Objective
    recipe: Mapping[str, Any]
    new: bool
    names: str


def start(run: TrainRun, *, offered: Mapping[str, Any] | None = None) -> Start:
    """The model and objective of a run. `offered` are options for objectives that have them.

    Raises `UsageError` for names, presets and options that are not there, `Refusal` for systems that
    have no objective or do not fit the model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)  # new weights, heads and copies are the same in every process
        return _start(run, offered or {})


def _start(run: TrainRun, offered: Mapping[str, Any]) -> Start:
    trainings = [(name, weight, training_of(name)) for name, weight in run.objectives]
    leader = trainings[0]
    model, new = _model(run, leader[0], leader[2])
    module = model.module
    made: list[tuple[str, float, Objective]] = []
    known: set[str] = set()
    for name, weight, training in trainings:
        accepted = _accepted(training)
        options = {key: value for key, value in offered.items() if key in accepted}
        options |= {key: value for key, value in run.options.items() if key in accepted}
        if run.weight_decay is not None and "weight_decay" in accepted:
            options["weight_decay"] = run.weight_decay
        known |= accepted
        made.append((name, weight, training.objective(module, **options)))
    unknown = sorted(set(run.options) - known)
    if unknown:
        raise UsageError(
            f"The objective {run.objective} has no option {', '.join(unknown)}.",
            hint=f"It has: {', '.join(sorted(known))}.",
        )
    model.config = dict(cast(Any, module).config.to_json())  # an objective may have set a head
    objective = made[0][2]
    if len(made) > 1 or made[0][1] != 1.0:
        objective = WeightedSum([(n, w, cast(PairObjective, o)) for n, w, o in made])
    names = " + ".join(name if weight == 1 else f"{weight:g} x {name}" for name, weight, _ in made)
    return Start(model, objective, leader[2].recipe, new, names)


def training_of(name: str) -> Training:
    """How an objective of this name trains: `clip`, `siglip` or a system's slug or number."""
    if name in _PLAIN:
        return _PLAIN[name]
    system = find(name)
    training = getattr(entry_module(system), "TRAINING", None)
    if training is None:
        others = [s.slug for s in all_systems() if hasattr(entry_module(s), "TRAINING")]
        raise Refusal(
            f"{system.slug} ({system.title}) has no training objective.",
            hint=f"These have: {', '.join([*_PLAIN, *others])}.",
        )
    return training


def _accepted(training: Training) -> set[str]:
    made = signature(training.objective).parameters.values()
    return {p.name for p in made if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)} - {"model"}


def _model(run: TrainRun, name: str, training: Training) -> tuple[Model, bool]:
    if run.model is not None:
        return new_model(run.model, name, training, run.tokenizer), True
    source = BUILTIN if run.init is None else run.init
    base = source if isinstance(source, Model) else load(source, device="cpu", tokenizer=run.tokenizer)
    if run.scratch:
        return as_started(_rebuilt(base), training, name, base=None), True
    return as_started(base, training, name, base={"name": base.name, "hash": base.hash}), False


def as_started(model: Model, training: Training, name: str, *, base: dict[str, Any] | None) -> Model:
    """The system's own model from this one, where the system has one; plain otherwise."""
    module: Any = training.start(model.module) if training.start is not None else model.module
    system = model.system
    if name not in _PLAIN:
        registered = find(name)
        cls = entry_class(registered)
        if isinstance(cls, type) and isinstance(module, cls):
            system = registered.slug
    return model.around(module, recipe=_recipe(module, model.recipe), system=system, base=base)


def _recipe(module: Any, otherwise: Recipe) -> Recipe:
    own = getattr(module, "recipe", None)
    return own if isinstance(own, Recipe) else otherwise


def _rebuilt(base: Model) -> Model:
    """The same architecture with new weights."""
    if base.system == "clip":
        module: Any = CLIP(ClipConfig.from_json(base.config))
    else:
        module = entry_class(find(base.system)).from_config(base.config)
    return base.around(module, name=f"{base.name} from scratch", licence=None, base=None)


def new_model(model: str | Path, name: str, training: Training, tokenizer_path: str | Path | None) -> Model:
    """A model with new weights: a preset's, or of a JSON file of a configuration."""
    presets: dict[str, Callable[[], Any]] = {**PRESETS, **training.presets}
    wanted = str(model)
    tokenizer = load(BUILTIN, device="cpu").tokenizer
    if tokenizer_path is not None:
        from moviola.clip.foreign_tokenizer import read_tokenizer

        tokenizer = read_tokenizer(tokenizer_path)
    if wanted in presets:
        config = presets[wanted]()
    elif Path(wanted).is_file():
        config = ClipConfig.from_json(read_json(Path(wanted)))
    else:
        raise UsageError(
            f"There is no preset {printable(wanted)!r} for {name}, and no such file.",
            hint=f"Presets: {', '.join(presets)}. Or a JSON file of a configuration.",
        )
    plain = wanted not in training.presets  # a system's presets are of its own model
    if isinstance(config, ClipConfig) and tokenizer is not None:
        config = replace(config, text=replace(config.text, vocab_size=tokenizer.size))
    module: Any = CLIP(config) if plain else entry_class(find(name)).from_config(config.to_json())
    system = "clip" if plain else find(name).slug
    made = Model(
        module,
        config=config.to_json(),
        recipe=recipe_of(module),
        tokenizer=tokenizer,
        name=wanted,
        system=system,
        device="cpu",
    )
    return as_started(made, training, name, base=None)


def identity(run: TrainRun, begun: Start, fingerprint: str) -> dict[str, str]:
    """What a resumed run must share besides its `TrainConfig`, in words that fit into an error."""
    options = {str(k): v for k, v in sorted(run.options.items())}
    if run.weight_decay is not None:
        options["weight_decay"] = run.weight_decay
    columns = json.dumps(dict(run.columns), sort_keys=True)
    seen = f"{fingerprint} {columns} {run.crop_area} {run.flip} {run.hold_out}"
    return {
        "objective": f"{begun.names} {json.dumps(options, sort_keys=True, default=str)}",
        "model": f"{begun.model.system} {begun.model.name} ({begun.model.hash})",
        "data": hashlib.sha256(seen.encode()).hexdigest()[:16],
    }
