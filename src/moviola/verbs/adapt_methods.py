"""The ways to adapt a model, by name: plain ones, and those of the house's systems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from moviola.parts.linear_head import linear_probe, nearest_mean
from moviola.systems.registry import all_systems, entry_module, find
from moviola.types import Adaptation, Refusal, UsageError

PLAIN = {
    "linear-probe": Adaptation(fit=linear_probe),
    "nearest-mean": Adaptation(fit=nearest_mean),
}


_NOT_FOR_USERS = ("logit_scale", "seed", "picture_N", "validation")


def methods() -> list[str]:
    """The name of every method, the plain ones first."""
    named = list(PLAIN)
    for system in all_systems():
        if system.room == "adaptation":
            declared = getattr(entry_module(system), "ADAPTATION", None)
            named += list(declared.sequence) or [system.slug] if declared else []
    return named


def adaptation_of(name: str) -> tuple[str, Adaptation]:
    """The method's own name and how it adapts; `name` may be a system's slug or number.

    Raises `UsageError` for a name that is not there, `Refusal` for a system that adapts nothing.
    """
    if name in PLAIN:
        return name, PLAIN[name]
    for system in all_systems():
        declared = getattr(entry_module(system), "ADAPTATION", None) if system.room == "adaptation" else None
        if declared is not None and name in declared.sequence:
            return name, declared
    try:
        system = find(name)
    except UsageError:
        raise UsageError(
            f"There is no method {name!r} to adapt with.", hint=f"There are: {', '.join(methods())}."
        ) from None
    declared = getattr(entry_module(system), "ADAPTATION", None)
    if declared is None:
        raise Refusal(
            f"{system.slug} ({system.title}) does not adapt a model.",
            hint=f"These do: {', '.join(methods())}.",
        )
    return system.slug, declared


def options_for(
    functions: Mapping[str, Callable[..., Any]], given: Mapping[str, Any], method: str
) -> dict[str, dict[str, Any]]:
    """The options that each function takes by keyword; one that none takes raises `UsageError`."""
    accepted = {
        role: {
            p.name
            for p in signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in _NOT_FOR_USERS
        }
        for role, function in functions.items()
    }
    known = set().union(*accepted.values())
    unknown = sorted(set(given) - known)
    if unknown:
        raise UsageError(
            f"The method {method} has no option {', '.join(unknown)}.",
            hint=f"It has: {', '.join(sorted(known))}." if known else "It has none.",
        )
    return {
        role: {name: value for name, value in given.items() if name in names}
        for role, names in accepted.items()
    }
