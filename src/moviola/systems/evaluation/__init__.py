"""Measuring models and generated videos."""

from __future__ import annotations

from moviola.types import System

SYSTEMS: tuple[System, ...] = ()
