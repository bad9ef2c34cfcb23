"""A trained model made to fit a task or domain."""

from __future__ import annotations

from moviola.types import System

SYSTEMS: tuple[System, ...] = ()
