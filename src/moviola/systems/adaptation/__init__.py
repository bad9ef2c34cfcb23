"""A trained model made to fit a task or domain."""

from __future__ import annotations

from moviola.types import System

SYSTEMS: tuple[System, ...] = (
    System(
        11,
        "vr-lwf",
        "VR-LwF: Don't Stop Learning: Towards Continual Learning for the CLIP Model",
        "https://arxiv.org/abs/2207.09248",
        'moviola.adapt_tasks("photos/", "run", method="vr-lwf", tasks=5)',
        "moviola.systems.adaptation.vr_lwf:VrLwf",
    ),
    System(
        12,
        "gda-clip",
        "GDA-CLIP: A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation",
        "https://arxiv.org/abs/2402.04087",
        'moviola.adapt("flowers/", "model", method="gda-clip", shots=16)',
        "moviola.systems.adaptation.gda_clip:GdaClip",
    ),
    System(
        46,
        "maple",
        "MaPLe: Multi-modal Prompt Learning",
        "https://arxiv.org/abs/2210.03117",
        'moviola.adapt("flowers/", "model", method="maple", shots=16)',
        "moviola.systems.adaptation.maple:Maple",
        marks=("prompt_learner.compound_prompt_projections.0.weight",),
    ),
    System(
        65,
        "gopro",
        "GOPro: Generate and Optimize Prompts in CLIP using Self-Supervised Learning",
        "https://arxiv.org/abs/2308.11605",
        'moviola.adapt("flowers/", "model", method="gopro", shots=16)',
        "moviola.systems.adaptation.gopro:GoPro",
        marks=("prompt_learner.rho.weight", "prompt_learner.style.linear.0.weight"),
    ),
)
