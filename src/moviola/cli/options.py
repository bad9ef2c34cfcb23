"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from moviola.types import UsageError


def named_values(given: Sequence[str] | None, option: str, *, parse: bool) -> dict[str, Any] | None:
    """A repeated option NAME=VALUE as a dictionary; `parse` reads numbers, true, false, null and lists."""
    if not given:
        return None
    made: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name:
            raise UsageError(f"{option} takes NAME=VALUE, got {one!r}.")
        made[name] = _value(value) if parse else value
    return made


def _value(text: str) -> Any:
    """Numbers, true, false, null and lists as JSON has them; anything else is the text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value
