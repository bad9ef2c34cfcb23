"""What a training run is: one frozen object behind the command's options and `moviola.train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from moviola.types import UsageError, printable


@dataclass(frozen=True)
class TrainRun:
    """Everything but the data and the folder. None: the system's own recipe, or the house's default.

    objective     `clip`, `siglip` or a system's slug; several add up, with weights: ("clip", "siglip=0.5")
    options       the objective's own settings by name
    init          the model to start from: anything `load` takes. Without `init` and `model`: builtin
    model         a new model instead: a preset's name, or a JSON file of a configuration
    scratch       new weights for the architecture of `init`
    tokenizer     a tokenizer's file, for a new model or a checkpoint without one
    columns       which columns of the table play a part: {"image": "jpg", "caption": "alt_text"}
    image_root    where relative picture paths start; the table's folder otherwise
    steps, epochs how long; one of them. Default: 5 epochs
    batch_size    rows of a step over all processes; default 256, or a quarter of a small set
    micro_batch   rows in the towers at a time: memory, not the result
    lr            peak learning rate; default the recipe's, 1e-5 to go on from a model, 5e-4 for a new one
    lr_floor      share of it that is left at the end; default the recipe's, else 0
    keep_statistics  BatchNorm keeps the means and variances it came with: for few classes, or small batches
    crop_area     least and largest share of a picture a random crop keeps
    flip          chance of mirroring a picture; leave it at 0 where captions say left and right
    hold_out      pairs kept from training to measure retrieval; default 1 in 20, at most 500
    probe         labelled pictures (as for `evaluate`) for zero-shot accuracy before, during and after
    probe_every   steps between two measurements; default a tenth of the run
    probe_limit   labelled pictures that are used
    average       also save (1 - average) * weights before + average * weights after
    """

    objective: str | tuple[str, ...] = "clip"
    options: Mapping[str, Any] = field(default_factory=dict)
    init: str | Path | None = None
    model: str | Path | None = None
    scratch: bool = False
    tokenizer: str | Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    image_root: str | Path | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    lr: float | None = None
    lr_floor: float | None = None
    warmup: int | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    clip_grad: float | None = None
    keep_statistics: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    episode_steps: int | None = None
    seed: int = 0
    crop_area: tuple[float, float] = (0.9, 1.0)
    flip: float = 0.0
    hold_out: int | None = None
    probe: str | Path | None = None
    probe_every: int | None = None
    probe_limit: int = 1000
    average: float | None = None
    checkpoint_activations: bool = False
    save_every: int | None = None
    log_every: int = 10
    workers: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UsageError("Give steps or epochs, not both.")
        if self.init is not None and self.model is not None:
            raise UsageError("Give init, a model to go on from, or model, a new one; not both.")
        if self.scratch and self.model is not None:
            raise UsageError("scratch is for the architecture of init; a new model has new weights anyway.")
        if self.average is not None and (not 0 < self.average < 1 or self.scratch or self.model is not None):
            raise UsageError(
                f"average is a share between 0 and 1, of weights that go on from a model, got {self.average}."
            )
        for name in ("steps", "epochs", "batch_size", "micro_batch", "probe_every", "save_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be positive, got {value}.")
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise UsageError(
                f"crop_area is two shares of the picture, 0 < least <= most <= 1, got {low}, {high}."
            )
        if not 0 <= self.flip <= 1:
            raise UsageError(f"flip is a chance between 0 and 1, got {self.flip}.")
        if self.hold_out is not None and self.hold_out < 0:
            raise UsageError(f"hold_out must not be negative, got {self.hold_out}.")

    @property
    def objectives(self) -> list[tuple[str, float]]:
        """Names and weights."""
        given = (self.objective,) if isinstance(self.objective, str) else tuple(self.objective)
        if not given:
            raise UsageError("A run needs an objective.", hint="For example: clip")
        return [_weighted(one) for one in given]


def _weighted(text: str) -> tuple[str, float]:
    name, _, weight = text.partition("=")
    try:
        return name, float(weight) if weight else 1.0
    except ValueError:
        raise UsageError(f"{text!r} is no objective with a weight.", hint="For example: siglip=0.5") from None


def read_run(path: str | Path) -> TrainRun:
    """The `config = moviola.TrainRun(...)` of a Python file, which is run: it must be your own."""
    import runpy

    path = Path(path)
    if not path.is_file():
        raise UsageError(f"There is no configuration file at {printable(path)}.")
    made = runpy.run_path(str(path)).get("config")
    if not isinstance(made, TrainRun):
        raise UsageError(
            f"{printable(path)} does not set `config` to a TrainRun, but to {type(made).__name__}.",
            hint="Write: import moviola; config = moviola.TrainRun(objective='clip', epochs=10)",
        )
    return made


def changed(run: TrainRun, changes: Mapping[str, Any]) -> TrainRun:
    """The run with some fields changed; a name that is none raises `UsageError`."""
    known = [f.name for f in fields(TrainRun)]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise UsageError(
            f"A training run has no setting {', '.join(unknown)}.", hint=f"It has: {', '.join(known)}."
        )
    return replace(run, **changes)
