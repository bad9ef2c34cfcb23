"""Regions, masks and boxes."""

from __future__ import annotations

from moviola.types import System

SYSTEMS: tuple[System, ...] = ()
