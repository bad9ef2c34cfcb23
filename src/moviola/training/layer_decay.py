"""Fine-tuning a pre-trained video transformer with a classifier of its own: deeper layers learn faster.

Bao et al. 2022 (BEiT); the rates of VideoMAE's fine-tuning. Axis letters: C classes, L tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moviola.training.recognition import HeadRecognition
from moviola.types import UsageError


class LayerDecay(HeadRecognition):
    """Each block learns at `layer_decay` times the rate of the next one, the classifier at the run's.

    `model` has its blocks in `encoder.blocks`, `encoder.set_drop_path` and `head_dropout`. `drop_path` is the
    last block's chance to be left out, `head_dropout` the share of the vector that the classifier misses.
    """

    def __init__(
        self,
        model: Any,
        tokens_CL: Tensor,
        *,
        layer_decay: float = 0.75,
        drop_path: float = 0.1,
        head_dropout: float = 0.0,
        weight_decay: float = 0.05,
        **options: Any,
    ) -> None:
        if not 0 < layer_decay <= 1 or not 0 <= head_dropout < 1:
            raise UsageError(
                f"layer_decay lies in (0, 1] and head_dropout in [0, 1), got {layer_decay}, {head_dropout}."
            )
        model.encoder.set_drop_path(drop_path)
        depth = len(model.encoder.blocks)
        scales = {f"encoder.blocks.{n}.": layer_decay ** (depth - n) for n in range(depth)}
        scales["encoder.patch_embed."] = layer_decay ** (depth + 1)
        super().__init__(model, tokens_CL, lr_scales=scales, weight_decay=weight_decay, **options)
        model.head_dropout = head_dropout
