"""STAN: a branch beside the last layers of a CLIP image tower that sees the order of frames.

It begins with what one of the tower's last layers gives for every frame. In each of its `depth` levels
patches attend along time, then within their frame by a layer like CLIP's own, and the tower's next layer is
added in between. The tower never sees the branch; the branch's class token is added to that of all frames of
its video in the end. (Liu et al. 2023, arXiv 2311.15075.)

Axis letters: B clips, T frames, F = B * T frames of all clips, P patches, R = B * P rows, L tokens of a frame
(class token first), D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.blocks import Attention, ResidualBlock
from moviola.clip.config import Activation, ClipConfig, VitConfig, build_config
from moviola.clip.formats import hf
from moviola.clip.keys import Keys, Rule
from moviola.parts.mug import TAU
from moviola.parts.side_network import OneQueryAttention
from moviola.types import ClipBatch, Refusal, UsageError

Head = Literal["mean", "mug", "mug-full"]


@dataclass(frozen=True)
class MugStanConfig(ClipConfig):
    """A CLIP, the branch beside its last `depth` layers, and the head.

    head         `mean`: one vector a video; `mug` and `mug-full`: frames, compared with words
    frames       that are sampled of a clip; `most_frames` is how many the branch can tell apart
    temperature  what cosines are divided by; it is not learned
    """

    depth: int = 4
    head: Head = "mean"
    frames: int = 12
    most_frames: int = 64
    tau: float = TAU
    temperature: float = 0.01
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.vision, VitConfig):
            raise Refusal(
                "Mug-STAN needs a CLIP with a vision transformer, got a ResNet.",
                hint="Start from ViT-B/32, ViT-B/16 or ViT-L/14, or the built-in model.",
            )
        if not 1 <= self.depth <= self.vision.layers:
            raise UsageError(
                f"depth is from 1 to the image tower's {self.vision.layers} layers, got {self.depth}."
            )
        if not 1 <= self.frames <= self.most_frames:
            raise UsageError(f"frames is from 1 to {self.most_frames}, got {self.frames}.")
        if self.head not in get_args(Head):
            raise UsageError(f"The head is {', '.join(get_args(Head))}, got {self.head!r}.")
        if not (self.tau > 0 and self.temperature > 0 and 0 <= self.drop_path < 1):
            raise UsageError(
                f"tau and temperature must be positive and drop_path in [0, 1), got {self.tau}, "
                f"{self.temperature} and {self.drop_path}."
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        made: Self = build_config(cls, {**data, **vars(ClipConfig.from_json(data))})
        return made

    @classmethod
    def over(cls, clip: ClipConfig, **options: Any) -> Self:
        """Beside this CLIP; the depth is the paper's 4, or that of a shallower tower."""
        shared = {name: getattr(clip, name) for name in ClipConfig.__dataclass_fields__}
        depth = min(4, clip.vision.layers) if isinstance(clip.vision, VitConfig) else 4
        return cls(**{**shared, "depth": depth, **options})


def drop_path(x_RLD: Tensor, rate: float, training: bool) -> Tensor:
    """Whole rows zeroed with chance `rate` while training, the others scaled up for it."""
    return x_RLD * F.dropout(x_RLD.new_ones(len(x_RLD), 1, 1), rate, training) if rate and training else x_RLD


class TimeLayer(nn.Module):
    """Each patch attends to the same place in the other frames: patches_BTPD -> patches_BTPD.

    The output map starts as zero, so a new layer changes nothing. `attend_BT` False: a frame not looked at.
    """

    def __init__(self, width: int, heads: int, rate: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.temporal_fc = nn.Linear(width, width)
        self.rate = rate
        nn.init.zeros_(self.temporal_fc.weight)
        nn.init.zeros_(self.temporal_fc.bias)

    def forward(self, patches_BTPD: Tensor, attend_BT: Tensor | None = None) -> Tensor:
        places = patches_BTPD.shape[2]
        x_RTD = self.ln_1(patches_BTPD).transpose(1, 2).flatten(0, 1)  # R = B * P
        mask = None if attend_BT is None else attend_BT.repeat_interleave(places, 0)[:, None, None]
        x_RTD = self.temporal_fc(drop_path(self.attn(x_RTD, mask_LL=mask), self.rate, self.training))
        return patches_BTPD + x_RTD.unflatten(0, (-1, places)).transpose(1, 2)


class SpaceLayer(ResidualBlock):
    """A layer of CLIP over each frame's patches and the video's one class token.

    The class token takes the mean over real frames of what it finds. With `class_only` the
    patches are returned as they came: nothing looks at those of the last level.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, act: Activation, rate: float) -> None:
        super().__init__(width, heads, mlp_ratio, act, causal=False)
        self.rate = rate

    def forward(  # type: ignore[override]
        self, cls_BD: Tensor, patches_BTPD: Tensor, mask_BT: Tensor, *, class_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        own_BT1D = cls_BD[:, None, None].expand(-1, mask_BT.shape[1], 1, -1)
        seen_FLD = self.ln_1(torch.cat([own_BT1D, patches_BTPD], dim=2).flatten(0, 1))
        if class_only:
            found_FLD = OneQueryAttention.forward(
                cast(OneQueryAttention, self.attn), seen_FLD[:, 0], seen_FLD
            ).unsqueeze(1)
        else:
            found_FLD = self.attn(seen_FLD)
        found_BTLD = drop_path(found_FLD, self.rate, self.training).unflatten(0, mask_BT.shape)
        cls_BD = cls_BD + mean_of_real(found_BTLD[:, :, 0], mask_BT)
        cls_BD = cls_BD + self.mlp(self.ln_2(cls_BD))
        if class_only:
            return cls_BD, patches_BTPD
        patches_BTPD = patches_BTPD + found_BTLD[:, :, 1:]
        return cls_BD, patches_BTPD + self.mlp(self.ln_2(patches_BTPD))


class Stan(nn.Module):
    """Outputs of CLIP's last `depth` layers over all frames -> the video's class token, cls_BD."""

    def __init__(self, config: MugStanConfig) -> None:
        super().__init__()
        vision = cast(VitConfig, config.vision)
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.time = nn.ModuleList(TimeLayer(vision.width, vision.heads, rate) for rate in rates)
        self.space = nn.ModuleList(
            SpaceLayer(vision.width, vision.heads, vision.mlp_ratio, config.activation, rate)
            for rate in rates
        )
        self.time_embedding = nn.Parameter(torch.randn(config.most_frames, vision.width))

    def forward(
        self, layers: Sequence[Tensor], class_D: Tensor, positions_LD: Tensor, mask_BT: Tensor
    ) -> Tensor:
        attend_BT = None if bool(mask_BT.all()) else mask_BT
        cls_BD = (class_D + positions_LD[0]).expand(len(mask_BT), -1)
        patches_BTPD = positions_LD[1:] + self.time_embedding[: mask_BT.shape[1], None]
        for level, (x_FLD, time, space) in enumerate(zip(layers, self.time, self.space, strict=True)):
            x_BTLD = x_FLD.unflatten(0, mask_BT.shape)
            cls_BD = cls_BD + mean_of_real(x_BTLD[:, :, 0], mask_BT)
            if not level:
                cls_BD = cls_BD / 2
            patches_BTPD = time(patches_BTPD + x_BTLD[:, :, 1:], attend_BT)
            last = level == len(layers) - 1
            cls_BD, patches_BTPD = space(cls_BD, patches_BTPD, mask_BT, class_only=last)
        return cls_BD


def check_clips(batch: ClipBatch, most: int) -> None:
    """`UsageError` unless clips are (B, T, 3, H, W), T at most `most`, each with a real frame."""
    shape, mask_BT = batch.frames_BTCHW.shape, batch.mask_BT
    if len(shape) != 5 or shape[2] != 3 or shape[:2] != mask_BT.shape:
        raise UsageError(
            f"Clips are (B, T, 3, H, W) with a mask (B, T), got {tuple(shape)} and {tuple(mask_BT.shape)}.",
            hint="Frames given flat must be unflattened: frames.unflatten(0, (-1, T)).",
        )
    if not 1 <= shape[1] <= most:
        raise UsageError(
            f"The branch tells apart 1 to {most} frames, got {shape[1]}.",
            hint="Sample fewer frames of each clip.",
        )
    if not bool(mask_BT.any(1).all()):
        raise UsageError("A clip without a real frame (mask all False) has no vector.")


def mean_of_real(x_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """The mean over real frames, of vectors as they are."""
    if mask_BT is None:
        return x_BTD.mean(1)
    weight_BT = mask_BT / mask_BT.sum(1, keepdim=True)
    return (x_BTD * weight_BT.to(x_BTD.dtype).unsqueeze(-1)).sum(1)


# --------------------------------------------------------------------------------------------------
# The authors' names
# --------------------------------------------------------------------------------------------------

_LAYERS = "visual.transformer.resblocks", "vision_model.encoder.layers"


def _official(name: str) -> str:
    """Where a tensor of the library's CLIP lies in the authors' model."""
    name = re.sub(r"^vision_model\.(encoder\.|embeddings\.)?", "backbone.", name)
    name = re.sub(r"^(?=visual_)", "backbone.", name)
    return re.sub(r"^(?=text_)", "text_backbone.", name)


def _moved(rule: Rule, ours: str = _LAYERS[0], theirs: str = _LAYERS[1]) -> Rule:
    """A rule of the library's table, with `ours` and `theirs` in the place of the image tower's layers."""
    names = (rule.official,) if isinstance(rule.official, str) else rule.official
    official = tuple(_official(name.replace(_LAYERS[1], theirs)) for name in names)
    one = official[0] if len(official) == 1 else official
    return Rule(str(rule.ours).replace(_LAYERS[0], ours), one, rule.transpose)


_CLIP = [rule for rule in hf.KEYS.rules if rule.ours != "logit_scale"]
_LAYER = [rule for rule in _CLIP if str(rule.ours).startswith(_LAYERS[0])]
STAN_KEYS = Keys(
    Rule("stan.time_embedding", "backbone.STAN_time_embed.weight"),
    Rule("stan.time.{n}.temporal_fc.{p}", "backbone.STAN_T_layers.{n}.temporal_fc.{p}"),
    *(_moved(rule, "stan.time", "backbone.STAN_T_layers") for rule in _LAYER),
    *(_moved(rule, "stan.space", "backbone.STAN_S_layers") for rule in _LAYER),
    *map(_moved, _CLIP),
    ignore=["text_backbone.text_model.embeddings.position_ids"],
)
"""A `MugStan`'s tensors under the authors' names: the library's CLIP in other places, and the branch."""
