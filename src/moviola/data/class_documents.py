"""Free text about classes: a folder with a .txt a class, or one JSON file by class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moviola.data.tables import read_json
from moviola.types import UsageError, printable


def read_documents(
    source: str | Path | Mapping[str, str],
    classes: Sequence[str],
    *,
    key: Callable[[str], str],
    encoding: str = "utf-8",
    some: bool = False,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Each class's text, and the documents that belong to none of them.

    A folder holds CLASS.txt; a JSON file {"CLASS": "text" or ["text", ...]}, which may be given as a mapping,
    or, as definitions are released, [{"word": "CLASS", "defn": "text"}]. A document is of the class whose
    `key` is equal ("ride_horse.txt", "Ride Horse"). `UsageError` names classes without one; with `some`
    they are left out.
    """
    path, found = _read(source, encoding)
    texts: dict[str, str] = {}
    names: dict[str, str] = {}
    for name, text in found.items():
        if (known := key(name)) in texts:
            raise UsageError(
                f"{printable(path)} has two documents of one class: {names[known]!r} and {name!r}.",
                hint="Put their text into one.",
            )
        texts[known], names[known] = text, name
    missing = [name for name in classes if key(name) not in texts]
    if missing and not some:
        there = ", ".join(list(found)[:5]) or "none"
        raise UsageError(
            f"{printable(path)} has no document for {len(missing)} of {len(classes)} classes: "
            f"{', '.join(missing[:5])}. It has: {there}.",
            hint="Add CLASS.txt for each, or leave these classes out.",
        )
    wanted = {key(name) for name in classes}
    unused = tuple(name for known, name in names.items() if known not in wanted)
    return {name: texts[key(name)] for name in classes if key(name) in texts}, unused


def document_names(source: str | Path | Mapping[str, str], *, encoding: str = "utf-8") -> list[str]:
    """The classes that there are documents of, `_` read as a space."""
    return [name.replace("_", " ") for name in _read(source, encoding)[1]]


def _read(source: str | Path | Mapping[str, str], encoding: str) -> tuple[Path, dict[str, str]]:
    if isinstance(source, Mapping):
        return Path("documents"), dict(source)
    path = Path(source)
    return path, _folder(path, encoding) if path.is_dir() else _json(path)


def _folder(folder: Path, encoding: str) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*.txt")):
        try:
            found[path.stem] = path.read_text(encoding="utf-8-sig" if encoding == "utf-8" else encoding)
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{printable(path)} is not {encoding} text ({error}).",
                hint="Name its encoding (encoding='cp1252', say), or save it as UTF-8.",
            ) from error
        except LookupError as error:
            raise UsageError(f"There is no encoding {encoding!r}.") from error
    if not found:
        raise UsageError(f"{printable(folder)} holds no .txt files.", hint="Expected one a class: CLASS.txt.")
    return found


def _json(path: Path) -> dict[str, str]:
    data = read_json(path)
    if isinstance(data, list) and all(isinstance(one, dict) and {"word", "defn"} <= set(one) for one in data):
        pairs = [(str(one["word"]), one["defn"]) for one in data]
    elif isinstance(data, Mapping):
        pairs = [(str(name), value) for name, value in data.items()]
    else:
        raise UsageError(
            f"{printable(path)} holds no class documents.",
            hint='Expected {"CLASS": "text", ...} or [{"word": "CLASS", "defn": "text"}, ...].',
        )
    return {name: _text(value, f"{printable(path)}, {name!r}") for name, value in pairs}


def _text(value: Any, where: str) -> str:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{where}: expected text or a list of texts, got a {type(value).__name__}.")
    return "\n".join(texts)
