"""Finding videos by text and text by videos."""

from __future__ import annotations

from moviola.types import System

SYSTEMS: tuple[System, ...] = (
    System(
        24,
        "comclip",
        "ComCLIP: Training-Free Compositional Image and Text Matching",
        "https://arxiv.org/abs/2211.13854",
        'moviola.match("a dog chasing a cat", ["A.jpg", "B.jpg"])',
        "moviola.systems.retrieval.comclip:ComClip",
    ),
    System(
        44,
        "xpool",
        "X-Pool: Cross-Modal Language-Video Attention for Text-Video Retrieval",
        "https://arxiv.org/abs/2203.15086",
        'moviola.load("a-trained-xpool").score(texts, frames_MTD)',
        "moviola.systems.retrieval.xpool:XPool",
        marks=("pool_frames.cross_attn.q_proj.weight", "pool_frames.linear_proj.weight"),
    ),
)
