"""Sentences around a class name. Several of them, averaged, make a steadier class vector than one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moviola.types import UsageError, printable

SIMPLE = ("a photo of a {}.",)

GENERAL = (
    "a photo of a {}.",
    "a picture showing a {}.",
    "a {}, seen from close by.",
    "a {}, far away in the distance.",
    "a blurred snapshot of a {}.",
    "a sharp, well lit photo of a {}.",
    "a dim photo of a {} taken at night.",
    "a grainy picture of a {}.",
    "a small {} somewhere in a scene.",
    "a large {} that fills the frame.",
    "part of a {}.",
    "a {} half hidden behind something.",
    "several of them: {}.",
    "an old photo of a {}.",
    "a {} in front of a plain background.",
    "a {} among many other things.",
    "a black and white photo of a {}.",
    "someone's own photo of their {}.",
    "a drawing of a {}.",
    "this is a {}.",
)

VIDEO = (
    "a video of {}.",
    "a short clip that shows {}.",
    "a frame from a video of {}.",
    "someone doing {}.",
    "people filmed during {}.",
    "an example of {}.",
)

SETS = {"simple": SIMPLE, "general": GENERAL, "video": VIDEO}


def read_templates(templates: str | Path | Sequence[str] | None = None) -> tuple[str, ...]:
    """Templates by the name of a set, from a file, or as given; None is the set `simple`.

    Sets: `simple` (one), `general` (20 ways to picture a thing), `video` (6, for actions). A file has
    one template a line, or is a JSON list. A single string with `{}` is itself the template. Each
    template must hold `{}`, where the class name goes.
    """
    if templates is None:
        return SIMPLE
    source = "The templates"
    if isinstance(templates, str) and templates in SETS:
        return SETS[templates]
    if isinstance(templates, str) and "{}" in templates:
        return (templates,)
    if isinstance(templates, str | Path):
        source, found = printable(templates), _read(Path(templates))
    else:
        found = [str(template) for template in templates]
    if not found:
        raise UsageError(f"{source}: there is not one template.")
    bad = [template for template in found if "{}" not in template]
    if bad:
        raise UsageError(
            f"{source}: a template needs {{}} where the class name goes, got {bad[0]!r}.",
            hint="For example: 'a photo of a {}.'",
        )
    return tuple(found)


def _read(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(
            f"There is no set of templates and no file called {printable(path)}.",
            hint=f"Use one of {', '.join(SETS)}, a file with one template a line, or a template with {{}}.",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The templates {printable(path)} cannot be read ({error}).") from error
    if path.suffix.lower() != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"The templates {printable(path)} are no JSON ({error}).") from error
    if not isinstance(found, list) or not all(isinstance(template, str) for template in found):
        raise UsageError(f"The templates {printable(path)} must be a JSON list of strings.")
    return found
