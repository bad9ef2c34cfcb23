"""Tables that rename, join and split the tensors of a checkpoint, in both directions.

A system's `KEYS` says once how its authors name their parameters; loading, exporting and comparing
gradients all read the same table. Nothing is dropped silently: what the table does not know, and
what the module misses, is an error that lists the names.

>>> table = Keys(Rule("blocks.{n}.qkv", ("layers.{n}.q", "layers.{n}.k", "layers.{n}.v")))
>>> sorted(table.official_names(["blocks.0.qkv"]))
['layers.0.k', 'layers.0.q', 'layers.0.v']
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from moviola.types import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

_HOLE = re.compile(r"\\\{(\w+)\\\}")
_SHOWN = 12  # names listed per kind in an error; the count is always given


@dataclass(frozen=True)
class Rule:
    """One line of a table: `{n}` stands for a number, any other `{name}` for any text.

    `official` may be a tuple: our tensor is theirs joined along axis 0, in that order. `ours` may be
    a tuple: theirs is ours joined. `transpose` swaps the last two axes of every tensor of the rule.
    """

    ours: str | tuple[str, ...]
    official: str | tuple[str, ...]
    transpose: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.ours, tuple) and isinstance(self.official, tuple):
            raise ValueError("A rule joins on one side only.")


@dataclass(frozen=True)
class _Pattern:
    template: str

    @cached_property
    def regex(self) -> re.Pattern[str]:
        def hole(match: re.Match[str]) -> str:
            name = match.group(1)
            return rf"(?P<{name}>\d+)" if name == "n" else rf"(?P<{name}>.+)"

        return re.compile(_HOLE.sub(hole, re.escape(self.template)))

    def match(self, key: str) -> dict[str, str] | None:
        found = self.regex.fullmatch(key)
        return found.groupdict() if found else None


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


class Keys:
    """An invertible table of rules; the first rule that matches a name decides.

    `ignore` lists official names that carry no weights (position ids, masks). Names no rule matches
    are errors, unless a rule such as `Rule("{rest}", "{rest}")` lets them through.
    """

    def __init__(self, *rules: Rule, ignore: Iterable[str] = ()) -> None:
        self.rules = rules
        self._ignore = tuple(_Pattern(p) for p in ignore)
        self._ours = [tuple(_Pattern(p) for p in _tuple(r.ours)) for r in rules]
        self._official = [tuple(_Pattern(p) for p in _tuple(r.official)) for r in rules]

    def under(self, prefix: str) -> Keys:
        """The same table for a module that sits below `prefix` on both sides."""

        def add(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
            return prefix + names if isinstance(names, str) else tuple(prefix + name for name in names)

        rules = (Rule(add(rule.ours), add(rule.official), rule.transpose) for rule in self.rules)
        return Keys(*rules, ignore=[prefix + pattern.template for pattern in self._ignore])

    def __add__(self, other: Keys) -> Keys:
        """Both tables as one; the first rule that matches decides."""
        ignored = [pattern.template for pattern in (*self._ignore, *other._ignore)]
        return Keys(*self.rules, *other.rules, ignore=ignored)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors under our names; works on gradients too (every step is linear)."""
        kept = {k: v for k, v in state.items() if not any(p.match(k) is not None for p in self._ignore)}
        return self._convert(kept, self._official, self._ours, "official")

    def to_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under their names."""
        return self._convert(state, self._ours, self._official, "house")

    def official_names(self, ours: Iterable[str]) -> list[str]:
        """The official names that a module with these names of ours reads.

        Parts of a rule that splits one official tensor must all be given, as for `to_official`.
        """
        import torch

        return list(self.to_official({name: torch.zeros(3, 1) for name in ours}))

    def load(self, module: nn.Module, state: Mapping[str, Tensor], *, source: str = "checkpoint") -> None:
        """Copy an official state dict into `module`; any missing, unexpected or misshapen name raises."""
        load_exact(module, self.from_official(state), source=source)

    def _convert(
        self,
        state: Mapping[str, Tensor],
        given: list[tuple[_Pattern, ...]],
        wanted: list[tuple[_Pattern, ...]],
        side: str,
    ) -> dict[str, Tensor]:
        import torch

        groups: dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, Tensor]] = {}
        unexpected = []
        for key, tensor in state.items():
            place = self._find(key, given)
            if place is None:
                unexpected.append(key)
                continue
            rule, part, holes = place
            groups.setdefault((rule, tuple(sorted(holes.items()))), {})[part] = tensor
        incomplete = []
        out: dict[str, Tensor] = {}
        for (rule, holes_items), parts in groups.items():
            holes = dict(holes_items)
            missing = [p.template.format(**holes) for i, p in enumerate(given[rule]) if i not in parts]
            if missing:
                incomplete += missing
                continue
            tensors = [parts[i] for i in range(len(parts))]
            if self.rules[rule].transpose:
                tensors = [t.transpose(-1, -2) for t in tensors]
            targets = [p.template.format(**holes) for p in wanted[rule]]
            joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            if len(joined) % len(targets) if len(targets) > 1 else False:
                raise CheckpointError(
                    f"{targets[0]}: cannot split {len(joined)} rows into {len(targets)} equal parts."
                )
            pieces = [joined] if len(targets) == 1 else joined.chunk(len(targets))
            out.update(zip(targets, pieces, strict=True))
        if unexpected or incomplete:
            raise CheckpointError(_report(side, missing=incomplete, unexpected=unexpected, shapes=[]))
        return out

    @staticmethod
    def _find(key: str, table: list[tuple[_Pattern, ...]]) -> tuple[int, int, dict[str, str]] | None:
        for rule, patterns in enumerate(table):
            for part, pattern in enumerate(patterns):
                holes = pattern.match(key)
                if holes is not None:
                    return rule, part, holes
        return None


def load_exact(module: nn.Module, state: Mapping[str, Tensor], *, source: str = "checkpoint") -> None:
    """Copy `state` into `module` when names and shapes agree exactly; else `CheckpointError` lists all.

    BatchNorm's `num_batches_tracked` is bookkeeping and may be absent.
    """
    import torch

    check_exact(module, state, source=source)
    own = module.state_dict()
    with torch.no_grad():
        for key, tensor in state.items():
            own[key].copy_(tensor)


def check_exact(module: nn.Module, state: Mapping[str, Tensor], *, source: str = "checkpoint") -> None:
    """Raise `CheckpointError` unless `state` has exactly the module's names and shapes."""
    check_names(module.state_dict(), state, source=source)


def check_names(own: Mapping[str, Tensor], state: Mapping[str, Tensor], *, source: str) -> None:
    """Raise `CheckpointError` unless `state` has exactly the names and shapes of `own`."""
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k}: expected {tuple(own[k].shape)}, got {tuple(v.shape)}"
        for k, v in state.items()
        if k in own and own[k].shape != v.shape
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(_report(source, missing, unexpected, shapes))


def _report(source: str, missing: list[str], unexpected: list[str], shapes: list[str]) -> str:
    lines = [f"The {source} names do not fit."]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{len(names)} {title}: {', '.join(names[:_SHOWN])}{more}.")
    return " ".join(lines)
