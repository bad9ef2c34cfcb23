"""The configuration and the blocks of DiST's side network, which runs beside a frozen image tower.

Two streams meet at every layer. The temporal one is narrow and sees all T frames, x_BTHWC; the integration
one has the tower's tokens of t = T / alpha frames, x_BtLC. Parameters carry the official names and shapes.
What is computed are equal forms where they cost less: the MLP over time and the fusion of alpha frames are
matrix products on channels-last tensors (their weights are kernels of convolutions), and one query attends
without projecting keys and values (`OneQueryAttention`). (Qing et al. 2023, arXiv 2309.07911.)

Axis letters: B clips, T dense frames, t sparse frames, F = B * t, L tokens of a frame (class token first),
P = H * W patches, C channels of a stream, D width of the tower, K taps of a convolution over time, O channels
out, N heads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.blocks import Attention, Mlp, QuickGELU
from moviola.clip.config import ClipConfig, VitConfig, build_config, vit_b_16
from moviola.clip.formats.common import ratio
from moviola.types import CheckpointError, UsageError

HEAD_WIDTH = 64


@dataclass(frozen=True)
class DistConfig:
    """A CLIP and the network beside it; the defaults are the paper's ViT-B/16 with 8 of 16 frames.

    layers       of the tower, from 0, whose tokens are taken; empty: all
    stem_patch   side in pixels of the temporal stem's patches; None: the tower's
    pool_heads   of the pooling layers; None: 64 channels each
    with_clip    share of plain CLIP's scores in the model's (the authors' zero-shot test: 0.5)
    """

    clip: ClipConfig = field(default_factory=vit_b_16)
    frames: int = 16
    alpha: int = 2
    layers: tuple[int, ...] = ()
    integration_dim: int = 384
    temporal_dim: int = 96
    integration_ratio: float = 1.0
    integration_temporal_ratio: float = 0.25
    temporal_ratio: float = 1.0
    kernel: int = 3
    stem_kernel: int = 5
    stem_patch: int | None = None
    pool_layers: int = 2
    pool_heads: int | None = None
    with_clip: float = 0.0

    def __post_init__(self) -> None:
        depth = len(self.selected)
        if self.alpha < 1 or self.frames < 1 or self.frames % self.alpha:
            raise UsageError(
                f"The frames must divide by alpha, got {self.frames} frames and alpha {self.alpha}.",
                hint="Take 16, 32 or 64 frames with alpha 2.",
            )
        strange = [n for n in self.selected if not 0 <= n < self.vision.layers]
        if strange or len(set(self.selected)) < depth:
            raise UsageError(
                f"layers are different ones of the tower's {self.vision.layers}, from 0, got {self.layers}."
            )
        if self.pool_heads is None and self.integration_dim % HEAD_WIDTH:
            raise UsageError(
                f"integration_dim must be a multiple of {HEAD_WIDTH}, got {self.integration_dim}.",
                hint="Or say how many pool_heads there are.",
            )
        if self.integration_dim % self.heads:
            raise UsageError(f"{self.heads} pool_heads do not divide integration_dim {self.integration_dim}.")
        if not (self.kernel % 2 and self.stem_kernel % 2):
            raise UsageError(f"Kernels over time are odd, got {self.kernel} and {self.stem_kernel}.")
        if not 0 <= self.with_clip < 1 or self.pool_layers < 1:
            raise UsageError(
                f"with_clip is a share in [0, 1) and pool_layers 1 or more, got {self.with_clip} and "
                f"{self.pool_layers}."
            )
        made = tuple(length // self.patch for length in self.pixels)
        if made != self.vision.grid:
            raise UsageError(
                f"The temporal stem's patches of {self.patch} pixels make a grid of {made}, the tower's is "
                f"{self.vision.grid}.",
                hint=f"Leave stem_patch out, or set it to {self.vision.patch_size}.",
            )

    @property
    def vision(self) -> VitConfig:
        if not isinstance(self.clip.vision, VitConfig):
            raise UsageError(
                "DiST needs a CLIP with a vision transformer, got a ResNet.",
                hint="Start from ViT-B/16 or ViT-L/14, or the built-in model.",
            )
        return self.clip.vision

    @property
    def pixels(self) -> tuple[int, int]:
        size = self.vision.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def patch(self) -> int:
        return self.vision.patch_size if self.stem_patch is None else self.stem_patch

    @property
    def selected(self) -> tuple[int, ...]:
        return self.layers or tuple(range(self.vision.layers))

    @property
    def heads(self) -> int:
        return self.integration_dim // HEAD_WIDTH if self.pool_heads is None else self.pool_heads

    @property
    def sparse(self) -> int:
        """How many frames the tower sees."""
        return self.frames // self.alpha

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DistConfig:
        return cast(DistConfig, build_config(cls, {**data, "clip": ClipConfig.from_json(data["clip"])}))

    @classmethod
    def over(cls, clip: ClipConfig, **options: Any) -> DistConfig:
        """Beside this CLIP: half as wide as its tower, at most the paper's 384; a quarter of that in time."""
        width = getattr(clip.vision, "width", 0) // 2 // HEAD_WIDTH * HEAD_WIDTH
        wide = int(options.get("integration_dim", min(384, max(HEAD_WIDTH, width))))
        return cls(**{"clip": clip, "integration_dim": wide, "temporal_dim": wide // 4, **options})


def side_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of the configuration that follow from the shapes of an official side network's tensors."""
    try:
        narrow, _, stem_kernel, stem_patch, _ = state["temporal_stem.weight"].shape
        sparse = state["temporal2integration_nets.0.cls_token"].shape[2]
        alpha = state["temporal2integration_nets.0.linear_fuse.weight"].shape[2]
        hidden, _, kernel = state["temporal_nets.0.temporal_net.c_fc1.weight"].shape[:3]
        wide = state["input_linears.0.weight"].shape[0]
        mlp = state["integration_nets.0.ffn.c_fc.weight"].shape[0]
        temporal_mlp = state["integration_nets.0.temporal_ffn.c_fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint is not DiST's: {error} is missing or of another shape."
        ) from error
    pools = {name.split(".")[1] for name in state if name.startswith("adapooling_nets.")}
    return {
        "frames": sparse * alpha,
        "alpha": alpha,
        "integration_dim": wide,
        "temporal_dim": narrow,
        "integration_ratio": ratio(mlp, wide),
        "integration_temporal_ratio": ratio(temporal_mlp, wide),
        "temporal_ratio": ratio(hidden, narrow),
        "kernel": kernel,
        "stem_kernel": stem_kernel,
        "stem_patch": stem_patch,
        "pool_layers": len(pools),
    }


def check_taps(config: DistConfig, frames_BTCHW: Tensor, taps: Mapping[int, Tensor], tokens: int) -> None:
    """`UsageError` unless clips have T frames and every selected layer `tokens` of t frames of each."""
    clips, sparse = len(frames_BTCHW), config.sparse
    if frames_BTCHW.ndim != 5 or frames_BTCHW.shape[1] != config.frames:
        raise UsageError(
            f"This network takes clips of {config.frames} frames, got {tuple(frames_BTCHW.shape)}.",
            hint="Sample by the model's frame_spec, or build it for that many frames.",
        )
    missing = [n for n in config.selected if n not in taps]
    if missing:
        raise UsageError(
            f"Tokens of the layers {list(config.selected)} are needed, those of {missing} are not there.",
            hint="Make them with `taps(frames)`.",
        )
    wanted = (clips * sparse, tokens, config.vision.width)
    for n in config.selected:
        if taps[n].shape != wanted:
            raise UsageError(
                f"Layer {n} should come as {wanted}: {sparse} frames of each of {clips} clips, with "
                f"{tokens - 1} patches and a class token; got {tuple(taps[n].shape)}.",
                hint="Make them with `taps(frames)`, from the same clips.",
            )


# --------------------------------------------------------------------------------------------------
# Starts, and convolutions as matrix products
# --------------------------------------------------------------------------------------------------

_STD = 0.02


def start_small(module: nn.Module) -> None:
    """The authors' start: truncated normal weights of 0.02 in every linear map and convolution, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv3d):
            nn.init.trunc_normal_(part.weight, std=_STD)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def token(*shape: int) -> nn.Parameter:
    """A learned token, from truncated normal numbers of 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=_STD))


def over_time(x_BTxC: Tensor, conv: nn.Conv3d) -> Tensor:
    """A convolution of kernel (K, 1, 1), K odd, that keeps the number of frames: x_BTxC -> y_BTxO.

    One matrix product for all K taps; their outputs are added where they belong.
    """
    weight_KOC = conv.weight.flatten(2).permute(2, 0, 1)
    taps, frames = len(weight_KOC), x_BTxC.shape[1]
    z_BTxKO = F.linear(x_BTxC, weight_KOC.flatten(0, 1)).unflatten(-1, (taps, -1))
    z_BTxKO = F.pad(z_BTxKO, (0, 0) * (z_BTxKO.ndim - 2) + (taps // 2, taps // 2))
    parts = [z_BTxKO[:, k : k + frames, ..., k, :] for k in range(taps)]
    return sum(parts[1:], parts[0] if conv.bias is None else parts[0] + conv.bias)


def pointwise(x_C: Tensor, conv: nn.Conv3d) -> Tensor:
    """A convolution of kernel (1, 1, 1)."""
    return F.linear(x_C, conv.weight.flatten(1), conv.bias)


# --------------------------------------------------------------------------------------------------
# The streams
# --------------------------------------------------------------------------------------------------


class TemporalNet(nn.Module):
    """Convolution over time, then over place, added to the stream and activated: x_BTHWC -> x_BTHWC."""

    def __init__(self, width: int, ratio: float, kernel: int) -> None:
        super().__init__()
        hidden = int(width * ratio)
        in_time = nn.Conv3d(width, hidden, (kernel, 1, 1), padding=(kernel // 2, 0, 0))
        in_place = nn.Conv3d(hidden, width, (1, 3, 3), padding=(0, 1, 1))
        self.ln = nn.LayerNorm(width)
        self.temporal_net = nn.Sequential(
            OrderedDict([("c_fc1", in_time), ("gelu1", QuickGELU()), ("c_fc2", in_place)])
        )
        self.gelu = QuickGELU()

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        y_BCTHW = self.temporal_net(self.ln(x_BTHWC).movedim(-1, 1))
        return self.gelu(x_BTHWC + y_BCTHW.movedim(1, -1))


class ToTemporal(nn.Module):
    """What the integration stream tells the temporal one: x_BtLC -> y_BtPO, once for alpha frames."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear_fuse = nn.Linear(width, out)

    def forward(self, x_BtLC: Tensor) -> Tensor:
        return self.linear_fuse(x_BtLC[:, :, 1:])


class ToIntegration(nn.Module):
    """What alpha frames of the temporal stream tell the integration one: x_BTHWC -> y_BtLO.

    The row of the class token is learned, one for each of the t frames.
    """

    def __init__(self, width: int, out: int, alpha: int, frames: int) -> None:
        super().__init__()
        self.linear_fuse = nn.Conv3d(width, out, (alpha, 1, 1), stride=(alpha, 1, 1))
        self.cls_token = token(1, 1, frames, out)

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        weight_OCA = self.linear_fuse.weight.flatten(2)
        x_BtAPC = x_BTHWC.flatten(2, 3).unflatten(1, (-1, weight_OCA.shape[-1]))
        y_BtPO = F.linear(
            x_BtAPC.transpose(2, 3).flatten(3), weight_OCA.transpose(1, 2).flatten(1), self.linear_fuse.bias
        )
        cls_Bt1O = self.cls_token.transpose(1, 2).expand(len(y_BtPO), -1, -1, -1)
        return torch.cat([cls_Bt1O, y_BtPO], dim=2)


class TimeMlp(nn.Module):
    """An MLP whose narrow middle looks over time: x_BtLC -> y_BtLC."""

    def __init__(self, width: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.c_fc1 = nn.Conv3d(width, hidden, 1)
        self.c_fc2 = nn.Conv3d(hidden, hidden, (kernel, 1, 1), padding=(kernel // 2, 0, 0))
        self.act = QuickGELU()
        self.c_proj = nn.Conv3d(hidden, width, 1)

    def forward(self, x_BtLC: Tensor) -> Tensor:
        y_BtLC = self.act(over_time(pointwise(x_BtLC, self.c_fc1), self.c_fc2))
        return pointwise(y_BtLC, self.c_proj)


class Integration(nn.Module):
    """An MLP of each token and one over the frames of its place, added: x_BtLC -> y_BtLC, no skip inside."""

    def __init__(self, width: int, ratio: float, temporal_ratio: float, kernel: int) -> None:
        super().__init__()
        self.ffn = Mlp(width, int(width * ratio), "quick_gelu")
        self.temporal_ffn = TimeMlp(width, int(width * temporal_ratio), kernel)
        self.ln = nn.LayerNorm(width)
        self.ln_temporal = nn.LayerNorm(width)

    def forward(self, x_BtLC: Tensor) -> Tensor:
        return self.ffn(self.ln(x_BtLC)) + self.temporal_ffn(self.ln_temporal(x_BtLC))


# --------------------------------------------------------------------------------------------------
# Pooling
# --------------------------------------------------------------------------------------------------


class OneQueryAttention(Attention):
    """Multi-head attention of a single query: query_FC, seen_FLC -> y_FC.

    Keys and values are never made. The query is brought to the width of what is seen, once a head, and the
    mean that it takes there is mapped to values afterwards: N products a token instead of 2C, and equal,
    since both maps are linear. The bias of keys adds the same to all scores of a head, so it changes nothing.
    """

    def forward(self, query_FC: Tensor, seen_FLC: Tensor) -> Tensor:  # type: ignore[override]
        q_weight, k_weight, v_weight = self.in_proj_weight.chunk(3)
        q_bias, _, v_bias = self.in_proj_bias.chunk(3)
        q_FNK = F.linear(query_FC, q_weight, q_bias).unflatten(-1, (self.heads, -1))
        q_FNK = q_FNK * q_FNK.shape[-1] ** -0.5
        asked_FNC = torch.einsum("fnk,nkc->fnc", q_FNK, k_weight.unflatten(0, (self.heads, -1)))
        share_FNL = (asked_FNC @ seen_FLC.transpose(1, 2)).softmax(dim=-1)
        found_FNK = torch.einsum(
            "fnc,nkc->fnk", share_FNL @ seen_FLC, v_weight.unflatten(0, (self.heads, -1))
        )
        return self.out_proj(found_FNK.flatten(1) + v_bias)


class CrossAttention(nn.Module):
    """One query attends to what is seen, both through one norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = OneQueryAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)

    def forward(self, query_FC: Tensor, seen_FLC: Tensor) -> Tensor:
        return self.attn(self.ln_1(query_FC), self.ln_1(seen_FLC))


class AdaPooling(nn.Module):
    """A token a frame gathers from its tokens, then one a clip gathers from those of its t frames.

    feature_BtLC, top_BC and spatial_BtC -> the next top_BC and spatial_BtC. Frames are known by position.
    """

    def __init__(self, width: int, heads: int, frames: int) -> None:
        super().__init__()
        self.temporal_transformer = CrossAttention(width, heads)
        self.positional_embedding = token(1, frames, width)
        self.output_map_cls_token = Mlp(width, 4 * width, "quick_gelu")
        self.ln_out_temp_cls_token = nn.LayerNorm(width)
        self.spatial_transformer = CrossAttention(width, heads)
        self.output_map_spatial_cls_token = Mlp(width, 4 * width, "quick_gelu")
        self.ln_out_spat_cls_token = nn.LayerNorm(width)

    def forward(self, feature_BtLC: Tensor, top_BC: Tensor, spatial_BtC: Tensor) -> tuple[Tensor, Tensor]:
        found_FC = self.spatial_transformer(spatial_BtC.flatten(0, 1), feature_BtLC.flatten(0, 1))
        spatial_BtC = spatial_BtC + found_FC.view_as(spatial_BtC)
        spatial_BtC = spatial_BtC + self.output_map_spatial_cls_token(self.ln_out_spat_cls_token(spatial_BtC))
        top_BC = top_BC + self.temporal_transformer(top_BC, spatial_BtC + self.positional_embedding)
        return top_BC + self.output_map_cls_token(self.ln_out_temp_cls_token(top_BC)), spatial_BtC
