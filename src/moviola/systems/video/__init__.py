"""Video encoders and classifiers."""

from __future__ import annotations

from moviola.types import System

SYSTEMS: tuple[System, ...] = (
    System(
        7,
        "mug-stan",
        "Mug-STAN: Adapting Image-Language Pretrained Models for General Video Understanding",
        "https://arxiv.org/abs/2311.15075",
        'moviola.load("mug-stan", init="builtin")',
        "moviola.systems.video.mug_stan:MugStan",
        marks=("backbone.STAN_time_embed.weight", "text_backbone.text_projection.weight"),
    ),
    System(
        8,
        "vifi-clip",
        "ViFi-CLIP: Fine-tuned CLIP Models are Efficient Video Learners",
        "https://arxiv.org/abs/2212.03640",
        'moviola.load("vifi-clip", init="builtin")',
        "moviola.systems.video.vifi_clip:VifiClip",
        marks=("prompt_learner.complete_text_embeddings", "image_encoder.class_embedding"),
    ),
    System(
        9,
        "x-clip",
        "X-CLIP: Expanding Language-Image Pretrained Models for General Video Recognition",
        "https://arxiv.org/abs/2208.02816",
        'moviola.load("x-clip", init="builtin")',
        "moviola.systems.video.x_clip:XClip",
        marks=("visual.transformer.resblocks.0.message_attn.in_proj_weight", "prompts_generator.alpha"),
    ),
    System(
        14,
        "ila",
        "ILA: Implicit Temporal Modeling with Learnable Alignment for Video Recognition",
        "https://arxiv.org/abs/2304.10465",
        'moviola.load("ila", init="builtin")',
        "moviola.systems.video.ila:Ila",
        marks=(
            "visual.transformer.resblocks.0.temporal_skip_fc.weight",
            "visual.transformer.resblocks.0.message_attn.prediction_block.0.weight",
        ),
    ),
    System(
        15,
        "frozen-in-time",
        "Frozen in Time: A Joint Video and Image Encoder for End-to-End Retrieval",
        "https://arxiv.org/abs/2104.00650",
        'moviola.train("pairs.parquet", "run", objective="frozen-in-time", model="frozen-small")',
        "moviola.systems.video.frozen_in_time:FrozenInTime",
        marks=("video_model.temporal_embed", "video_model.blocks.0.timeattn.qkv.weight"),
    ),
    System(
        18,
        "zsarcap",
        "Tell me what you see: A zero-shot action recognition method based on natural language descriptions",
        "https://arxiv.org/abs/2112.09976",
        'moviola.classify_through_sentences("clips/", captions="said.json", documents="texts/")',
        "moviola.systems.video.zsarcap:ZsarCap",
    ),
    System(
        23,
        "m2-clip",
        "M2-CLIP: A Multimodal, Multi-task Adapting Framework for Video Action Recognition",
        "https://arxiv.org/abs/2401.11649",
        'moviola.load("m2-clip", init="builtin")',
        "moviola.systems.video.m2_clip:M2Clip",
        marks=("visual.t_adapter.conv.weight", "mlm_adapter.decoder.weight"),
    ),
    System(
        43,
        "sts-statistics",
        "Self-supervised Video Representation Learning by Uncovering Spatio-temporal Statistics",
        "https://arxiv.org/abs/2008.13426",
        'moviola.train("videos/", "run", objective="sts-statistics", model="sts-small")',
        "moviola.systems.video.sts_statistics:STS",
        marks=("motion_linear.weight", "app_linear.weight"),
    ),
    System(
        67,
        "dist",
        "DiST: Disentangling Spatial and Temporal Learning for Efficient Image-to-Video Transfer Learning",
        "https://arxiv.org/abs/2309.07911",
        'moviola.load("dist", init="builtin")',
        "moviola.systems.video.dist:DiST",
        marks=("backbone.base_encoder.dist_net.temporal_stem.weight",),
    ),
)
