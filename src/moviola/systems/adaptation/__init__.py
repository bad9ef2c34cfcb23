"""A trained model made to fit a task or domain."""

from __future__ import annotations

from moviola.types import System

SYSTEMS: tuple[System, ...] = (
    System(
        12,
        "gda-clip",
        "GDA-CLIP: A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation",
        "https://arxiv.org/abs/2402.04087",
        'moviola.adapt("flowers/", "model", method="gda-clip", shots=16)',
        "moviola.systems.adaptation.gda_clip:GdaClip",
    ),
)
