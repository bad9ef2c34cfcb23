"""Models trained from pairs of pictures or videos and text."""

from __future__ import annotations

from moviola.types import System

SYSTEMS: tuple[System, ...] = (
    System(
        0,
        "clip",
        "CLIP: Learning Transferable Visual Models From Natural Language Supervision",
        "https://arxiv.org/abs/2103.00020",
        'moviola.load("openai/clip-vit-base-patch32")',
        "moviola.systems.pretraining.clip:CLIP",
    ),
    System(
        5,
        "long-clip",
        "Long-CLIP: Unlocking the Long-Text Capability of CLIP",
        "https://arxiv.org/abs/2403.15378",
        'moviola.load("long-clip", init="builtin")',
        "moviola.systems.pretraining.long_clip:LongClip",
        marks=("positional_embedding_res",),
    ),
    System(
        27,
        "rs-m-clip",
        "RS-M-CLIP: Multilingual Vision-Language Pre-training for the Remote Sensing Domain",
        "https://arxiv.org/abs/2410.23370",
        'moviola.train("pairs.parquet", "run", objective="rs-m-clip")',
        "moviola.systems.pretraining.rs_m_clip:RsMClip",
        marks=(
            "text.transformer.embeddings.word_embeddings.weight",
            "visual.conv1.weight",
        ),
    ),
    System(
        48,
        "protoclip",
        "ProtoCLIP: Prototypical Contrastive Language Image Pretraining",
        "https://arxiv.org/abs/2206.10996",
        'moviola.train("pairs.parquet", "run", objective="protoclip", episode_steps=400)',
        "moviola.systems.pretraining.protoclip:ProtoClip",
        marks=(
            "text_projection_head.0.weight",
            "image_projection_head.0.weight",
        ),
    ),
    System(
        54,
        "mobileclip",
        "MobileCLIP: Fast Image-Text Models through Multi-Modal Reinforced Training",
        "https://arxiv.org/abs/2311.17049",
        'moviola.train("reinforced", "run", objective="mobileclip", model="mobileclip_s0")',
        "moviola.systems.pretraining.mobileclip:MobileClip",
        marks=(
            "image_encoder.model.head.proj",
            "text_encoder.projection_layer",
        ),
    ),
    System(
        57,
        "alip",
        "ALIP: Adaptive Language-Image Pre-training with Synthetic Caption",
        "https://arxiv.org/abs/2308.08428",
        'moviola.train("pairs.parquet", "run", objective="alip")',
        "moviola.systems.pretraining.alip:Alip",
    ),
    System(
        58,
        "cloob",
        "CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP",
        "https://arxiv.org/abs/2110.11316",
        'moviola.train("pairs.parquet", "run", objective="cloob")',
        "moviola.systems.pretraining.cloob:Cloob",
        marks=("logit_inv_tau",),
    ),
    System(
        61,
        "grain",
        "GRAIN: Grounding Descriptions in Images informs Zero-Shot Visual Recognition",
        "https://arxiv.org/abs/2412.04429",
        'moviola.train("pairs.parquet", "run", objective="grain")',
        "moviola.systems.pretraining.grain:Grain",
        marks=(
            "clip.visual.blocks.0.attn.q_norm.weight",
            "decoder.query_embed.weight",
        ),
    ),
)
