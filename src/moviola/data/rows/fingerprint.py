"""What tells one set of files from another without reading them whole."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moviola.data.hashing import hash_uniform
from moviola.types import UsageError, printable

SPOTS = 16
_SAMPLE = 1 << 16  # bytes of a file's head and tail, and of each spot
_WHOLE = 4 << 20  # a file up to this size is read whole
_MOST_OPENED = 4096  # files whose content is looked at; of more, that many by hash


def content_hash(files: Sequence[tuple[str, Path]]) -> str:
    """16 hex digits over names, sizes and content samples of files: head, tail and 16 spots of each.

    Where files lie and when they were written does not count, so a copy has the same digits.
    """
    digest = hashlib.sha256()
    sizes = []
    for name, path in files:
        try:
            sizes.append(path.stat().st_size)
        except OSError as error:
            raise UsageError(
                f"{printable(path)} cannot be reached ({error.strerror}).", hint="Check the path."
            ) from error
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + str(sizes[-1]).encode() + b"\0")
    chosen = np.arange(len(files))
    if len(files) > _MOST_OPENED:
        chosen = np.sort(np.argsort(hash_uniform(0, chosen), kind="stable")[:_MOST_OPENED])
    for index in chosen.tolist():
        path, size = files[index][1], sizes[index]
        with path.open("rb") as file:
            if size <= _WHOLE:
                digest.update(file.read())
                continue
            places = np.linspace(0, size - _SAMPLE, SPOTS + 2).astype(np.int64)
            for place in places.tolist():
                file.seek(place)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]
