"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from moviola import types
from moviola.types import UsageError

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[types.Dtype | None, typer.Option(help="Precision of the model. [default: float32]")]
BatchSize = Annotated[int, typer.Option(help="Pictures or frames per pass through the model.", min=1)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
TokenizerFile = Annotated[str | None, typer.Option("--tokenizer", help="For checkpoints without one.")]


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
