"""Video encoders and classifiers."""

from __future__ import annotations

from moviola.types import System

SYSTEMS: tuple[System, ...] = ()
