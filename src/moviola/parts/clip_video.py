"""What X-CLIP and ILA put on top of an image tower: frames into one vector, and texts that see the video.

`MultiframeIntegration` (MIT) mixes the vectors of a video's frames, which it knows by position, into one.
`VideoPrompts` lets every class text attend to the patches of a video and adds what it finds to the text: the
same class has another vector for every video. `ClipVideo` is the CLIP that has both; a system gives it the
block class of its image tower. (Ni et al. 2022, arXiv 2208.02816; Tu et al. 2023, arXiv 2304.10465.)

A video is encoded as one tensor of R = 1 + P rows: row 0 is its vector, the others are the context that texts
attend to, a row a patch, averaged over frames. They are not frames: a mask of frames says nothing of them.

Axis letters: B, M videos, T frames, F = B * T frames of all videos, P patches, C, N texts, D width of the
image tower, E embedding width, H heads, K width of one head, L tokens (class token first), R rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.blocks import Block, Mlp, ResidualBlock
from moviola.clip.config import ClipConfig, VitConfig, build_config
from moviola.clip.keys import Keys, Rule
from moviola.clip.model import CLIP
from moviola.clip.vit import VisionTransformer
from moviola.parts.fixed_frames import FixedFrames
from moviola.types import CheckpointError, ClipBatch, UsageError

HEAD_WIDTH = 64
_NUMBERS = 1 << 24  # most numbers in the widest tensor while videos and classes are scored


@dataclass(frozen=True)
class ClipVideoConfig(ClipConfig):
    """A CLIP, the frames of a clip, and the parts on top; `alpha` is where the weight of prompts starts."""

    frames: int = 8
    mit_layers: int = 1
    mit_heads: int = 8
    prompt_layers: int = 2
    prompt_heads: int = 8
    alpha: float = 0.1

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        made: Self = build_config(cls, {**data, **vars(ClipConfig.from_json(data))})
        return made

    @classmethod
    def over(cls, clip: ClipConfig, **options: Any) -> Self:
        """For this CLIP; heads are 64 wide unless said otherwise."""
        shared = {name: getattr(clip, name) for name in ClipConfig.__dataclass_fields__}
        heads = max(1, clip.embed_dim // HEAD_WIDTH)
        return cls(**{**shared, "mit_heads": heads, "prompt_heads": heads, **options})


def _start(module: nn.Module) -> None:
    """The authors' start of linear maps: normal numbers of 0.02, no bias."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


# --------------------------------------------------------------------------------------------------
# Frames into one vector
# --------------------------------------------------------------------------------------------------


class MultiframeIntegration(nn.Module):
    """frames_BTE -> video_BE: transformer blocks over frames with learned positions, mean with the input."""

    def __init__(self, frames: int, width: int, *, layers: int = 1, heads: int = 8) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(1, frames, width))
        self.resblocks = nn.ModuleList(
            ResidualBlock(width, heads, 4.0, "quick_gelu", causal=False) for _ in range(layers)
        )
        nn.init.trunc_normal_(self.positional_embedding, std=0.02)
        _start(self)

    def forward(self, frames_BTE: Tensor) -> Tensor:
        y_BTE = frames_BTE + self.positional_embedding
        for block in self.resblocks:
            y_BTE = block(y_BTE)
        return (y_BTE + frames_BTE).mean(dim=1)


# --------------------------------------------------------------------------------------------------
# Texts that see the video
# --------------------------------------------------------------------------------------------------


class TextToVideo(nn.Module):
    """Texts attend to a video's context; the maps of queries, keys and values have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise UsageError(f"The width must divide by the heads, got width {width} and {heads} heads.")
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def split(self, x_BLE: Tensor) -> Tensor:
        """x_BLE -> x_BHLK"""
        return x_BLE.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, context_MPE: Tensor) -> tuple[Tensor, Tensor]:
        """k_MHPK and v_MHPK: they depend on the video alone, so one serves all classes."""
        return self.split(self.k_proj(context_MPE)), self.split(self.v_proj(context_MPE))

    def forward(self, text_BCE: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """text_BCE of one video each, or text_1CE of all alike -> found_MCE."""
        q_BHCK = self.split(self.q_proj(text_BCE))
        found_MHCK = F.scaled_dot_product_attention(q_BHCK.expand(len(keys), -1, -1, -1), keys, values)
        return self.proj(found_MHCK.transpose(1, 2).flatten(2))


class PromptLayer(nn.Module):
    """Cross-attention and MLP, each added to its input. Classes do not attend to each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.cross_attn = TextToVideo(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width, "quick_gelu")

    def forward(self, text_BCE: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        text_MCE = text_BCE + self.cross_attn(self.norm1(text_BCE), keys, values)
        return text_MCE + self.mlp(self.norm3(text_MCE))


class VideoPrompts(nn.Module):
    """What a video adds to each class text: text_CE, context_MPE -> added_MCE.

    The stream begins with the text itself, so what is added contains the text, `alpha` times.
    """

    def __init__(self, width: int, *, layers: int = 2, heads: int = 8, alpha: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(PromptLayer(width, heads) for _ in range(layers))
        self.alpha = nn.Parameter(torch.full((width,), alpha))
        _start(self)

    def memory(self, context_MPE: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer, once for each video."""
        context_MPE = self.norm(context_MPE)
        return [cast(PromptLayer, layer).cross_attn.keys_values(context_MPE) for layer in self.decoder]

    def added(self, text_CE: Tensor, memory: list[tuple[Tensor, Tensor]]) -> Tensor:
        x_BCE = text_CE[None]  # the same for all videos until they are first looked at
        for layer, (keys, values) in zip(self.decoder, memory, strict=True):
            x_BCE = layer(x_BCE, keys, values)
        return self.alpha * x_BCE

    def forward(self, text_CE: Tensor, context_MPE: Tensor) -> Tensor:
        return self.added(text_CE, self.memory(context_MPE)).expand(len(context_MPE), -1, -1)

    def cosines(
        self, text_CE: Tensor, video_ME: Tensor, context_MPE: Tensor, *, numbers: int = _NUMBERS
    ) -> Tensor:
        """cosine_CM of every video and every class text plus what the video adds to it.

        Some videos and classes at a time, so that no tensor holds many more than `numbers` numbers however
        many there are of both; keys and values are computed once a video.
        """
        room = max(1, numbers // (4 * text_CE.shape[1]))  # pairs at a time in the widest layer
        columns = []
        for unit_mE, context_mPE in zip(
            F.normalize(video_ME, dim=-1).split(room), context_MPE.split(room), strict=True
        ):
            memory = self.memory(context_mPE)
            rows = [
                torch.einsum("mce,me->cm", F.normalize(one_cE + self.added(one_cE, memory), dim=-1), unit_mE)
                for one_cE in text_CE.split(max(1, room // max(1, len(unit_mE))))
            ]
            columns.append(torch.cat(rows))
        return torch.cat(columns, dim=1)


# --------------------------------------------------------------------------------------------------
# The whole model
# --------------------------------------------------------------------------------------------------


class ClipVideo(FixedFrames, CLIP):  # type: ignore[override]  # frame_spec: an attribute there, a property here
    """A CLIP over clips of `config.frames` frames whose texts see the video: an `Encoder`, not separable.

    `block` makes the image tower's blocks; they get the tokens of all frames, x_FLD, those of a video
    together and in order. Text tower and temperature are CLIP's.
    """

    separable = False
    config: ClipVideoConfig
    visual: VisionTransformer

    def __init__(self, config: ClipVideoConfig, *, block: Block) -> None:
        if not isinstance(config.vision, VitConfig):
            raise UsageError(
                f"{type(self).__name__} needs a CLIP with a vision transformer, got a ResNet.",
                hint="Start from ViT-B/32, ViT-B/16 or ViT-L/14, or the built-in model.",
            )
        if config.frames < 1:
            raise UsageError(f"A clip needs one frame or more, got frames={config.frames}.")
        super().__init__(config, block=block)
        self.frames = config.frames
        width, wide = config.embed_dim, config.vision.width
        self.mit = MultiframeIntegration(
            config.frames, width, layers=config.mit_layers, heads=config.mit_heads
        )
        self.prompts_generator = VideoPrompts(
            width, layers=config.prompt_layers, heads=config.prompt_heads, alpha=config.alpha
        )
        self.prompts_visual_ln = nn.LayerNorm(wide)
        self.prompts_visual_proj = nn.Parameter(torch.randn(wide, width))

    def start_from(self, clip: CLIP) -> Self:
        """Take over the weights of a plain CLIP; what it lacks stays as it was made."""
        own, given = self.state_dict(), clip.state_dict()
        strange = [name for name in given if name not in own or own[name].shape != given[name].shape]
        if strange:
            raise CheckpointError(f"The CLIP's tensors do not fit the tower: {', '.join(strange[:5])}.")
        self.load_state_dict(given, strict=False)
        return self.eval()

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """A picture as the clip that shows it in every frame: its vector_BE, not normalised."""
        return self.pool(self.encode_video(self.still(pixels_BCHW)))

    def frame_features(self, frames_FCHW: Tensor) -> tuple[Tensor, Tensor]:
        """frames_FE, and the patches before the last norm, patches_FPD."""
        last = len(self.visual.transformer.resblocks) - 1
        out = self.visual(frames_FCHW, taps=(last,))
        return out.vector_BD, out.layers[last][:, 1:]

    def integrate(self, frames_BTE: Tensor, patches_BTPD: Tensor) -> Tensor:
        """video_BRE of frame vectors and patches; the mean over frames comes before the map: the same."""
        context_BPE = self.prompts_visual_ln(patches_BTPD).mean(dim=1) @ self.prompts_visual_proj
        return torch.cat([self.mit(frames_BTE)[:, None], context_BPE], dim=1)

    def encode_video(self, batch: ClipBatch) -> Tensor:
        """ClipBatch -> video_BRE: the video's vector, then its context. Not normalised."""
        frames_FE, patches_FPD = self.frame_features(self.frames_of(batch).flatten(0, 1))
        shape = (-1, self.frames)
        return self.integrate(frames_FE.unflatten(0, shape), patches_FPD.unflatten(0, shape))

    def pool(self, video: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """video_BRE -> its row 0, the vector that no text has looked at."""
        return video[:, 0]

    def score(self, text_ND: Tensor, video: Tensor, mask_MT: Tensor | None = None) -> Tensor:
        """Logit scale times the cosine of each video with each text as the video changes it: (N, M).

        `mask_MT` is not read: every frame of a clip counts, and what is masked there was integrated before.
        """
        rows = len(self.visual.positional_embedding)
        if video.ndim != 3 or video.shape[1:] != (rows, self.dim):
            raise UsageError(
                f"This model scores videos as encode_video gives them, (M, {rows}, {self.dim}): a vector and "
                f"{rows - 1} patches, got {tuple(video.shape)}.",
                hint="Vectors of single frames cannot be scored; encode the clip.",
            )
        return self.logit_scale.exp() * self.prompts_generator.cosines(text_ND, video[:, 0], video[:, 1:])


HEAD_KEYS = Keys(
    Rule("prompts_generator.decoder.{n}.mlp.c_fc.{rest}", "prompts_generator.decoder.{n}.mlp.0.{rest}"),
    Rule("prompts_generator.decoder.{n}.mlp.c_proj.{rest}", "prompts_generator.decoder.{n}.mlp.3.{rest}"),
)
"""Names of the parts on top that are not the authors'; all others are."""


def head_sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """`frames`, `mit_layers` and `prompt_layers` of an official state dict."""
    table = state.get("mit.positional_embedding")
    if table is None:
        raise CheckpointError("The checkpoint has no mit.positional_embedding, so its frames are not known.")
    counted = {
        "mit_layers": {name.split(".")[2] for name in state if name.startswith("mit.resblocks.")},
        "prompt_layers": {n.split(".")[2] for n in state if n.startswith("prompts_generator.decoder.")},
    }
    return {"frames": table.shape[1], **{name: len(numbers) for name, numbers in counted.items()}}
