"""Choosing and balancing training data."""

from __future__ import annotations

from moviola.types import System

SYSTEMS: tuple[System, ...] = (
    System(
        1,
        "metaclip",
        "Demystifying CLIP Data",
        "https://arxiv.org/abs/2309.16671",
        "moviola curate run PAIRS --metadata FILE --to FOLDER",
        "moviola.systems.curation.metaclip:MetaClip",
    ),
)
