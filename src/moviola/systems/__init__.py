"""The published systems, in ten rooms. A room's `SYSTEMS` tuple is the registration; no torch here."""

from __future__ import annotations

ROOMS = (
    "curation",
    "pretraining",
    "adaptation",
    "video",
    "retrieval",
    "grounding",
    "dense",
    "language",
    "generation",
    "evaluation",
)
