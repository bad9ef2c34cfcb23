"""`train`: a model from pairs on disk, by any objective of the house, killed and resumed at will."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from moviola.clip.blocks import set_checkpointing
from moviola.clip.loaded import Model, choose_device, to_channels_last
from moviola.data.reinforced import MANIFEST, read_manifest
from moviola.data.rows import PairData, RowSource, check, held_out, open_rows
from moviola.data.rows.feed import feed
from moviola.files import atomic
from moviola.metrics.retrieval import retrieval_metrics
from moviola.training.averaging import interpolate
from moviola.training.checkpoint import CHECKPOINT, read_metrics
from moviola.training.config import TrainConfig
from moviola.training.loop import SKIPPED, to_device
from moviola.training.loop import Progress as Logged
from moviola.training.loop import train as run_loop
from moviola.training.processes import Processes, several
from moviola.types import Needs, PictureField, ScriptField, TextField, UsageError, VideoField, printable
from moviola.verbs.common import Progress
from moviola.verbs.evaluate import evaluate_zero_shot
from moviola.verbs.train_report import draw
from moviola.verbs.train_run import TrainRun, changed
from moviola.verbs.train_start import Start, identity, start

if TYPE_CHECKING:
    from moviola.types import Batch

RUN, MODEL, AVERAGED = "run.json", "model", "model-averaged"
_ZERO_SHOT = "zero-shot top-1"


@dataclass(frozen=True)
class TrainReport:
    """What a run did. `before` and `after` hold the figures of the same measurements, in percent."""

    folder: Path
    model: Path
    objective: str
    pairs: int
    held_out: int
    steps: int
    losses: dict[str, float]
    before: dict[str, float]
    after: dict[str, float]
    averaged: Path | None = None
    averages: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: int = 0
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.folder),
            "model": str(self.model),
            "objective": self.objective,
            "pairs": self.pairs,
            "held_out": self.held_out,
            "steps": self.steps,
            "losses": self.losses,
            "before": self.before,
            "after": self.after,
            "averaged": None if self.averaged is None else str(self.averaged),
            "averages": self.averages,
            "skipped": self.skipped,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        losses = ", ".join(f"{name} {value:.4f}" for name, value in self.losses.items())
        lines = [f"{self.objective}: {self.steps} steps over {self.pairs} pairs; {losses}."]
        lines += [
            f"{name}: {self.before[name]:.1f} before, {value:.1f} after"
            for name, value in self.after.items()
            if name in self.before
        ]
        for share, figures in self.averages.items():
            told = ", ".join(f"{name} {value:.1f}" for name, value in figures.items())
            lines.append(f"averaged, {share} of the trained weights: {told}")
        if self.skipped:
            lines.append(f"{self.skipped} rows could not be used: {printable(self.folder / SKIPPED)}")
        lines += self.notes
        lines.append(f"Model: {printable(self.model)}")
        if self.averaged is not None:
            lines.append(f"Averaged model: {printable(self.averaged)}")
        return "\n".join(lines)


def train(
    data: str | Path | Sequence[str | Path],
    to: str | Path,
    run: TrainRun | None = None,
    *,
    on_progress: Progress | None = None,
    **settings: Any,
) -> TrainReport:
    """Train a model on pairs of pictures and texts; see `TrainRun` for every setting.

    >>> moviola.train("pairs.parquet", "run", objective="cloob", epochs=10)       # doctest: +SKIP

    data   Parquet, CSV, TSV, JSON Lines, WebDataset tars or folders, several together
    to     the run's folder: `model/` is the trained model, `metrics.jsonl` the losses, `losses.png` the
           curves, `checkpoint.pt` what the same call goes on from after a kill

    `settings` change fields of `run`. Under `torchrun` the processes share every batch.
    Raises `UsageError` for settings and data that cannot be meant, `NotFinite` where a loss explodes.
    """
    run = changed(run or TrainRun(), settings)
    sources = [data] if isinstance(data, str | Path) else list(data)
    folder = Path(to)
    processes = several(cpu=run.device == "cpu")
    try:
        return _train(sources, folder, run, processes, on_progress)
    finally:
        processes.close()


def _train(
    sources: Sequence[str | Path],
    folder: Path,
    run: TrainRun,
    processes: Processes,
    on_progress: Progress | None,
) -> TrainReport:
    begun = start(run, offered=_stored(sources))
    source = open_rows(
        sources, columns=run.columns or None, root=None if run.image_root is None else Path(run.image_root)
    )
    model = begun.model
    shown_needs = _shown(begun.objective.needs, source)
    measurable = model.has_text and model.separable and shown_needs is not None
    if run.hold_out and not measurable:
        raise UsageError(
            f"Held-out rows measure retrieval: the data needs captions, the model '{model.name}' words and "
            "one vector for each row.",
            hint="Leave hold_out out.",
        )
    pairs, kept = _split(source, run) if measurable else (source, None)
    if model.tokenizer is None and model.has_text:
        raise UsageError(
            f"The model '{model.name}' has no tokenizer.", hint="Name its file with --tokenizer."
        )
    prepared = partial(PairData, recipe=model.recipe, tokenizer=model.tokenizer, frame_spec=model.frame_spec)
    rows = prepared(pairs, begun.objective.needs, crop_area=run.crop_area, flip=run.flip)
    notes = check(rows)
    config = _config(run, begun, len(rows))
    device = processes.device or choose_device(run.device)
    module = model.module.to(device)
    if any(isinstance(m, nn.BatchNorm2d) for m in module.modules()):
        to_channels_last(module)
    set_checkpointing(module, run.checkpoint_activations)
    who = identity(run, begun, rows.fingerprint)
    _describe(folder, run, config, who, sources, processes)
    shown = None if kept is None or shown_needs is None else prepared(kept, shown_needs)
    probes = _Probes(run, begun, device, shown)
    before_weights = (
        {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
        if run.average is not None
        else {}
    )
    run_loop(
        module,
        begun.objective,
        rows,
        config,
        folder,
        identity=who,
        processes=processes,
        feed=partial(_fed, workers=run.workers),
        on_progress=_told(on_progress, config),
        evaluate=probes if probes.any else None,
        evaluate_every=run.probe_every or max(1, config.steps // 10),
    )
    for parameter in module.parameters():
        parameter.grad = None
    averaged, averages = None, {}
    if processes.main:
        _as_model(begun, module).save(folder / MODEL)
        if run.average is not None:
            averages = probes.sweep(module, before_weights, run.average)
            averaged = _save_average(folder, begun, module, before_weights, run.average)
    processes.wait()
    metrics = read_metrics(folder)
    if processes.main:
        notes += draw(metrics, folder / "losses.png")
    skipped = folder / SKIPPED
    figures = [line for line in metrics if any(name in line for name in probes.names)]
    if not begun.new and run.probe is None:
        notes.append("No --probe was named: what the model forgot of other pictures was not measured.")
    before = _figures(figures[0], probes.names) if figures else {}
    after = _figures(figures[-1], probes.names) if figures else {}
    if not begun.new and run.average is None and after.get(_ZERO_SHOT, 0.0) < before.get(_ZERO_SHOT, 0.0):
        notes.append("Zero-shot accuracy fell. --average 0.5 also saves the weights halfway back.")
    return TrainReport(
        folder=folder,
        model=folder / MODEL,
        objective=begun.names,
        pairs=len(rows),
        held_out=0 if kept is None else len(kept),
        steps=config.steps,
        losses=last_losses(metrics),
        before=before,
        after=after,
        averaged=averaged,
        averages=averages,
        skipped=len(skipped.read_text().splitlines()) if skipped.exists() else 0,
        notes=tuple(notes),
    )


def _stored(sources: Sequence[str | Path]) -> dict[str, Any]:
    """Options that the data itself answers: the widths of a reinforced set's teachers."""
    for source in sources:
        if (Path(source) / MANIFEST).is_file():
            return {"teacher_dims": read_manifest(source).dims}
    return {}


def _shown(needs: Needs, source: RowSource) -> Needs | None:
    """What retrieval is measured with: whole pictures or clips, and the objective's own first text.

    None where the objective reads no text of its own and the data has no captions.
    """
    texts = [field for field in needs.fields if isinstance(field, TextField) and not field.optional]
    if not texts and not source.captions:
        return None
    text = replace(texts[0], name="text") if texts else TextField()
    if any(isinstance(field, VideoField | ScriptField) for field in needs.fields):
        return Needs((VideoField(), text))
    return Needs((PictureField(area=(1.0, 1.0)), text))


def _fed(
    data: Any, steps: Sequence[tuple[int, int, np.ndarray]], seed: int, *, workers: int
) -> Iterator[Batch]:
    return feed(data, steps, seed=seed, workers=workers)


def _split(source: RowSource, run: TrainRun) -> tuple[RowSource, RowSource | None]:
    """Rows to train on, and rows to measure retrieval on."""
    count = run.hold_out
    if count is None:
        count = min(500, len(source) // 20)
    if count < 2:
        return source, None
    if count >= len(source):
        raise UsageError(f"Holding out {count} of {len(source)} pairs leaves none to train on.")
    return held_out(source, count, run.seed)


def _config(run: TrainRun, begun: Start, count: int) -> TrainConfig:
    """The loop's configuration: what the run says, else the recipe, else the house's defaults."""
    recipe = begun.recipe
    batch = run.batch_size or min(int(recipe.get("batch_size", 256)), 256, max(2, count // 4))
    if batch < 2:
        raise UsageError("A batch of one has nothing to contrast with.", hint="Use --batch-size 2 or more.")
    if batch > count:
        raise UsageError(
            f"There are {count} pairs to train on, fewer than one batch of {batch}.",
            hint="Lower --batch-size or --hold-out, or add data.",
        )
    epochs = 5.0 if run.epochs is None else run.epochs
    steps = run.steps or max(1, math.ceil(epochs * (count // batch)))
    given: dict[str, Any] = {
        "lr": run.lr or recipe.get("lr") or (5e-4 if begun.new else 1e-5),
        "warmup": min(int(recipe.get("warmup", 200)), steps // 10) if run.warmup is None else run.warmup,
        "betas": run.betas or recipe.get("betas"),
        "eps": recipe.get("eps"),
        "clip_grad": run.clip_grad or recipe.get("clip_grad"),
        "episode_steps": run.episode_steps or recipe.get("episode_steps"),
        "lr_floor": recipe.get("lr_floor") if run.lr_floor is None else run.lr_floor,
        "optimizer": recipe.get("optimizer"),
        "momentum": recipe.get("momentum"),
        "keep_statistics": run.keep_statistics,
        "save_every": run.save_every or max(1, min(500, steps // 10)),
    }
    return TrainConfig(
        steps=steps,
        batch_size=batch,
        micro_batch=run.micro_batch,
        precision=run.precision,
        seed=run.seed,
        log_every=min(run.log_every, steps),
        **{name: value for name, value in given.items() if value is not None},
    )


def _describe(
    folder: Path,
    run: TrainRun,
    config: TrainConfig,
    who: Mapping[str, str],
    sources: Sequence[str | Path],
    processes: Processes,
) -> None:
    """`run.json`: what was asked for, for people and for other programs."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RUN).is_file():
        raise UsageError(
            f"{printable(folder)} holds other files: it is no run's folder.",
            hint="Name a new folder with --to.",
        )
    if not processes.main or (folder / CHECKPOINT).exists():
        return
    about = {
        "data": [str(source) for source in sources],
        "run": {k: _plain(v) for k, v in vars(run).items()},
        "config": vars(config),
        "identity": dict(who),
        "processes": processes.count,
    }
    with atomic(folder / RUN) as file:
        file.write(json.dumps(about, indent=1, default=str).encode())


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Model) else value


def _told(on_progress: Progress | None, config: TrainConfig) -> Callable[[Logged], None] | None:
    if on_progress is None:
        return None

    def tell(logged: Logged) -> None:
        losses = ", ".join(f"{name} {value:.3f}" for name, value in logged.losses.items())
        on_progress(logged.step, config.steps, f"{losses}, {logged.rows_per_second:.0f} pairs/s")

    return tell


def _as_model(begun: Start, module: nn.Module) -> Model:
    """The module as a model of its own, on the CPU."""
    return begun.model.around(module, name=f"{begun.model.name} trained by {begun.names}")


def _save_average(
    folder: Path,
    begun: Start,
    module: nn.Module,
    before: Mapping[str, torch.Tensor],
    share: float,
) -> Path:
    trained = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(interpolate(before, trained, share))
    path = _as_model(begun, module).save(folder / AVERAGED)
    module.load_state_dict(trained)
    return path


class _Probes:
    """Measurements of a model while it trains: retrieval among pairs kept apart, zero-shot accuracy."""

    def __init__(
        self, run: TrainRun, begun: Start, device: torch.device, pairs: PairData | None, size: int = 64
    ) -> None:
        clips = pairs is not None and any(isinstance(f, VideoField) for f in pairs.needs.fields)
        self.run, self.begun, self.device, self.pairs = run, begun, device, pairs
        self.size = size // 8 if clips else size  # a clip is as large as several pictures
        kind = "clip" if clips else "picture"
        self.names = [f"held-out R@1, {kind} to text", f"held-out R@1, text to {kind}"]
        self.names = self.names if self.pairs is not None else []
        if run.probe is not None:
            self.names.append(_ZERO_SHOT)

    @property
    def any(self) -> bool:
        return bool(self.names)

    def __call__(self, module: nn.Module, step: int) -> dict[str, float]:
        figures: dict[str, float] = {}
        if self.pairs is not None:
            figures |= self._retrieval(module, self.pairs)
        if self.run.probe is not None:
            model = self.begun.model.around(module, device=self.device, hash=f"step {step}")
            report = evaluate_zero_shot(model, self.run.probe, limit=self.run.probe_limit)
            figures[_ZERO_SHOT] = report.top1
        return figures

    def _retrieval(self, module: Any, pairs: PairData) -> dict[str, float]:
        rows = np.arange(len(pairs))
        image, text = [], []
        with torch.no_grad():
            for chunk in np.array_split(rows, math.ceil(len(rows) / self.size)):
                batch = to_device(pairs.batch(chunk, seed=0, epoch=0, step=0), self.device)
                seen = (
                    module.encode_video(batch["clip"])
                    if "clip" in batch
                    else module.encode_image(batch["image"])
                )
                image.append(nn.functional.normalize(seen.float(), dim=-1))
                text.append(nn.functional.normalize(module.encode_text(batch["text"]).float(), dim=-1))
        sims_NM = (torch.cat(text) @ torch.cat(image).T).cpu().numpy()
        metrics = retrieval_metrics(sims_NM, rows, ks=(1,))
        return dict(zip(self.names[:2], (metrics["v2t"]["R1"], metrics["t2v"]["R1"]), strict=True))

    def sweep(
        self, module: nn.Module, before: Mapping[str, torch.Tensor], share: float
    ) -> dict[str, dict[str, float]]:
        """The figures along the line from the weights before to those after."""
        trained = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        found = {}
        if self.any:
            for part in sorted({0.0, 0.25, 0.5, 0.75, 1.0, share}):
                module.load_state_dict(interpolate(before, trained, part))
                found[f"{part:g}"] = self(module.eval(), -1)
            module.load_state_dict(trained)
        return found


def _figures(line: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    return {name: float(line[name]) for name in names if name in line}


def last_losses(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    for line in reversed(metrics):
        if "gradient_norm" in line:
            others = ("step", "gradient_norm", "lr", "rows_per_second")
            return {name: float(value) for name, value in line.items() if name not in others}
    return {}


__all__ = ["TrainReport", "TrainRun", "train"]
