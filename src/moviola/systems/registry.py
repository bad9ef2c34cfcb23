"""Which systems there are, and how to reach them. Imports no torch until a system is opened."""

from __future__ import annotations

import difflib
from importlib import import_module
from types import ModuleType
from typing import Any

from moviola.systems import ROOMS
from moviola.types import System, UsageError

PLAIN_METHODS = {
    "linear-probe": "moviola.parts.linear_head:WithHead",
    "nearest-mean": "moviola.parts.linear_head:WithHead",
}
"""Ways to adapt a model that are no system of the house, and the classes of their models."""


def all_systems() -> tuple[System, ...]:
    """Every registered system, by number."""
    found = [s for room in ROOMS for s in import_module(f"moviola.systems.{room}").SYSTEMS]
    return tuple(sorted(found, key=lambda system: system.number))


def find(name: str | int) -> System:
    """The system with this slug or number: `find("xpool")`, `find(44)` and `find("44")` agree.

    Raises `UsageError` with the nearest slugs for any other name.
    """
    systems = all_systems()
    wanted = str(name).strip().lower()
    for system in systems:
        if wanted in (system.slug, str(system.number)):
            return system
    near = difflib.get_close_matches(wanted, [s.slug for s in systems], n=3, cutoff=0.5)
    raise UsageError(
        f"There is no system called {name!r}.",
        hint=f"Did you mean {' or '.join(near)}?" if near else "See: moviola systems",
    )


def model_class(name: str) -> Any:
    """The class that reads a model folder of this system or plain method (imports torch)."""
    if name in PLAIN_METHODS:
        module, _, attribute = PLAIN_METHODS[name].partition(":")
        return getattr(import_module(module), attribute)
    return entry_class(find(name))


def entry_module(system: System) -> ModuleType:
    """The module of the system's entry file (imports torch)."""
    return import_module(system.entry.partition(":")[0])


def entry_class(system: System) -> Any:
    """The class or function that `System.entry` names (imports torch)."""
    return getattr(entry_module(system), system.entry.partition(":")[2])
