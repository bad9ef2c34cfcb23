"""Fixtures shared by all tests. Nothing here reaches the network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("COLUMNS", "160")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real photos and videos beside the checkout; skips where it is absent."""
    folder = Path(os.environ.get("MOVIOLA_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("no shared data folder beside the checkout (set MOVIOLA_SHARED)")
    return folder


@pytest.fixture(scope="session")
def oracles_dir() -> Path:
    return Path(__file__).parent / "oracles"
