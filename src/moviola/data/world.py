"""The made world: a seeded generator of pictures and short videos with the whole truth about them."""

from __future__ import annotations

from moviola.data.world_scene import Ground, Photo, Scene, Thing, picture

__all__ = ["Ground", "Photo", "Scene", "Thing", "picture"]
