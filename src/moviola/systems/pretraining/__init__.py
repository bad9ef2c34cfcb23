"""Models trained from pairs of pictures or videos and text."""

from __future__ import annotations

from moviola.types import System

SYSTEMS: tuple[System, ...] = (
    System(
        0,
        "clip",
        "CLIP: Learning Transferable Visual Models From Natural Language Supervision",
        "https://arxiv.org/abs/2103.00020",
        'moviola.load("openai/clip-vit-base-patch32")',
        "moviola.systems.pretraining.clip:CLIP",
    ),
)
