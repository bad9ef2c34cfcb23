"""Several objectives in one run, their losses added with weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn

from moviola.training.objectives import decay_groups
from moviola.types import Batch, Episode, Needs, PairObjective, UsageError


class WeightedSum(nn.Module):
    """The first objective leads: its parameter groups and schedule hold for the model.

    The towers run once for all objectives that ask for the same inputs. Losses are named
    `objective.loss`, times their weight. Implements `moviola.types.PairObjective`; the objectives must
    all be pair objectives and, where they need a field of one name, need the same of it.
    """

    scope: Literal["pair", "token", "local"] = "pair"

    def __init__(self, parts: Sequence[tuple[str, float, PairObjective]]) -> None:
        super().__init__()
        names = [name for name, _, _ in parts]
        if not parts or len(set(names)) < len(names):
            raise UsageError(f"Objectives to add up must be named once each, got {', '.join(names)}.")
        for name, weight, objective in parts:
            if not (math.isfinite(weight) and weight > 0):
                raise UsageError(f"The weight of {name} must be positive, got {weight}.")
            if not isinstance(objective, PairObjective):
                raise UsageError(f"{name} is no pair objective: it trains alone.")
        self.names = [name.replace(".", "_") for name in names]
        self.weights = [weight for _, weight, _ in parts]
        self.objectives = nn.ModuleList([cast(nn.Module, objective) for _, _, objective in parts])
        self.needs = Needs(tuple(_union(self._parts())))

    def _parts(self) -> list[PairObjective]:
        return [cast(PairObjective, objective) for objective in self.objectives]

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        shared = cast(nn.Module, _Remembering(model))
        made: dict[str, Tensor] = {}
        for name, objective in zip(self.names, self._parts(), strict=True):
            made |= {f"{name}.{key}": value for key, value in objective.outputs(shared, batch).items()}
        return made

    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for name, weight, objective in zip(self.names, self.weights, self._parts(), strict=True):
            own = {
                key.removeprefix(f"{name}."): value
                for key, value in outputs.items()
                if key.startswith(f"{name}.")
            }
            losses |= {f"{name}.{key}": weight * value for key, value in objective.loss(model, own).items()}
        return losses

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.loss(model, self.outputs(model, batch))

    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        first, *others = self._parts()
        groups = list(first.param_groups(model))
        held = {id(p) for group in groups for p in group["params"]}
        for objective in others:
            for group in decay_groups(cast(nn.Module, objective), 0.1):
                group["params"] = [p for p in group["params"] if id(p) not in held]
                groups.append(group)
        return [group for group in groups if group["params"]]

    def lr_factors(self, step: int, steps: int) -> Sequence[float] | None:
        return None if len(self.objectives) > 1 else self._parts()[0].lr_factors(step, steps)

    def on_episode(self, model: nn.Module, episode: Episode) -> None:
        for objective in self._parts():
            objective.on_episode(model, episode)

    def before_step(self, model: nn.Module) -> None:
        for objective in self._parts():
            objective.before_step(model)

    def after_step(self, model: nn.Module) -> None:
        for objective in self._parts():
            objective.after_step(model)


def _union(objectives: Iterable[PairObjective]) -> list[Any]:
    fields: dict[tuple[type, str], Any] = {}
    for objective in objectives:
        for field in objective.needs.fields:
            key = (type(field), getattr(field, "name", ""))
            if fields.setdefault(key, field) != field:
                raise UsageError(
                    f"Two of these objectives need a different {getattr(field, 'name', 'field')!r}: "
                    f"{fields[key]} and {field}.",
                    hint="They cannot train together.",
                )
    return list(fields.values())


class _Remembering:
    """A model that encodes the same tensor once. Lives for one call of `outputs`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._made: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._model, name)
        if name not in ("encode_image", "encode_text"):
            return attribute

        def encode(given: Tensor) -> Tensor:
            key = (name, id(given))
            if key not in self._made:
                self._made[key] = (given, attribute(given))  # holds `given`, so that its id stays its own
            return self._made[key][1]

        return encode
