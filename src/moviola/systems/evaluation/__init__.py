"""Measuring models and generated videos."""

from __future__ import annotations

from moviola.types import System

SYSTEMS: tuple[System, ...] = (
    System(
        51,
        "clip-robustness",
        "Toward a Holistic Evaluation of Robustness in CLIP Models",
        "https://arxiv.org/abs/2410.01534",
        'moviola.audit(["builtin", "mine"], "photos/", to="audit")',
        "moviola.systems.evaluation.clip_robustness:ClipRobustness",
    ),
)
