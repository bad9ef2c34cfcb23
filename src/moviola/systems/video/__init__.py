"""Video encoders and classifiers."""

from __future__ import annotations

from moviola.types import System

SYSTEMS: tuple[System, ...] = (
    System(
        9,
        "x-clip",
        "X-CLIP: Expanding Language-Image Pretrained Models for General Video Recognition",
        "https://arxiv.org/abs/2208.02816",
        'moviola.load("x-clip", init="builtin")',
        "moviola.systems.video.x_clip:XClip",
        marks=("visual.transformer.resblocks.0.message_attn.in_proj_weight", "prompts_generator.alpha"),
    ),
)
