"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["atomic"]


@contextmanager
def atomic(path: Path) -> Iterator[IO[Any]]:
    """A binary file beside `path` that takes its name when the block ends well, and goes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".writing", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w+b", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes files that only the owner reads
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
