"""A CLIP with adapters in both towers, a class head on its clips and a block where texts look at frames.

The model that M2-CLIP trains (Wang et al. 2024, arXiv 2401.11649). Names of parameters are its authors':
CLIP's and, each with "adapter" in it, what is new. The fusion block is the last of the text tower's stack,
which texts pass unchanged; with `mlm_adapter` it guesses hidden words, and serves training alone.

Axis letters: B clips, T frames, F = B * T frames of all clips, L tokens, D width of the image tower, W of the
text tower, E embedding width, C classes (channels in pixels), V words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.blocks import Block
from moviola.clip.config import ClipConfig, VitConfig, build_config
from moviola.clip.model import CLIP
from moviola.clip.vit import VisionTransformer
from moviola.parts.fixed_frames import FixedFrames
from moviola.parts.ted_adapter import AdaptedBlock, FusionBlock, TedAdapter, TemporalAdapter, TextAdapter
from moviola.types import ClipBatch, Refusal, UsageError

Adapters = Literal["12x384", "24x384"]


@dataclass(frozen=True)
class M2ClipConfig(ClipConfig):
    """A CLIP, the frames of a clip, and where adapters stand: in the last `*_adapters` blocks of each tower.

    The fusion block counts as the text tower's last. An adapter stands before a block's MLP and, `*_twice`,
    another before its attention. `classes` and `words` are the sizes of the two heads, 0 without one.
    """

    frames: int = 8
    vision_channels: int = 384
    vision_adapters: int = 12
    vision_twice: bool = False
    text_channels: int = 384
    text_adapters: int = 2
    text_twice: bool = False
    dropout: float = 0.5
    classes: int = 0
    words: int = 0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        made: Self = build_config(cls, {**data, **vars(ClipConfig.from_json(data))})
        return made

    @classmethod
    def over(cls, clip: ClipConfig, *, adapters: Adapters = "12x384", **options: Any) -> Self:
        """For this CLIP: "12x384" has one adapter a block, "24x384" (for Something-Something) two.

        In the text tower the first stands in the last block and the fusion block (with patches of more than
        16 pixels in the fusion block alone), the second in all blocks (twice with patches of up to 16), as
        officially. Beside narrow towers adapters are narrower too: 1/2 and 3/4 of the tower's width.
        """
        if adapters not in ("12x384", "24x384"):
            raise UsageError(f"The adapters are 12x384 or 24x384, got {adapters!r}.")
        if not isinstance(clip.vision, VitConfig):
            raise UsageError(
                "M2-CLIP needs a CLIP with a vision transformer, got a ResNet.",
                hint="Start from ViT-B/32 or ViT-B/16, or the built-in model.",
            )
        twice, fine = adapters == "24x384", clip.vision.patch_size <= 16
        placed = {
            "vision_channels": min(384, clip.vision.width // 2),
            "vision_adapters": clip.vision.layers,
            "vision_twice": twice,
            "text_channels": min(384, clip.text.width * 3 // 4),
            "text_adapters": clip.text.layers + 1 if twice else 1 + fine,
            "text_twice": twice and fine,
        }
        shared = {name: getattr(clip, name) for name in ClipConfig.__dataclass_fields__}
        return cls(**{**shared, **placed, **options})


def m2_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of the configuration that a state dict decides: all but CLIP's and `frames`."""
    sizes: dict[str, Any] = {}
    for side, layer in (("vision", "fc1"), ("text", "textad_fc1")):
        start = ("visual." if side == "vision" else "") + "transformer.resblocks."
        found = [n for n in state if n.startswith(start) and n.endswith(f"adapter_pre_mlp.{layer}.weight")]
        sizes[f"{side}_adapters"] = len(found)
        sizes[f"{side}_twice"] = any(n.startswith(start) and "adapter_pre_attn" in n for n in state)
        if found:
            sizes[f"{side}_channels"] = len(state[found[0]])
    for name, key in (("classes", "visual.adapter_fc.bias"), ("words", "mlm_adapter.bias")):
        sizes[name] = len(state.get(key, ()))
    return sizes


def adapted(
    kinds: Sequence[type[AdaptedBlock]], last: int, adapter: Callable[[int], nn.Module], twice: bool
) -> list[Block]:
    """The blocks of a stack, of which the `last` ones have adapters."""
    plain = len(kinds) - last
    return [*kinds[:plain], *(partial(kind, adapter=adapter, twice=twice) for kind in kinds[plain:])]


def in_turn(blocks: Sequence[Block]) -> Block:
    """A block class that is the next of these each time a tower makes a block."""
    left = iter(blocks)
    return lambda *args, **options: next(left)(*args, **options)


class WordHead(nn.Module):
    """BERT's head: x_BLW -> logits_BLV."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        dense, norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
        self.transform = nn.ModuleDict({"dense": dense, "LayerNorm": norm})
        self.decoder = nn.Linear(width, words, bias=False)
        self.bias = nn.Parameter(torch.zeros(words))
        for linear in (dense, self.decoder):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(dense.bias)

    def forward(self, x_BLW: Tensor) -> Tensor:
        x_BLW = self.transform["LayerNorm"](F.gelu(self.transform["dense"](x_BLW)))
        return self.decoder(x_BLW) + self.bias


@dataclass(slots=True)
class Seen:
    """What the image tower makes of clips: frames_BTE for texts, cls_BD (a mean of frames) for classes."""

    frames_BTE: Tensor
    cls_BD: Tensor

    @property
    def video_BE(self) -> Tensor:
        return self.frames_BTE.mean(dim=1)


class TedClip(FixedFrames, CLIP):  # type: ignore[override]  # frame_spec: a property here
    """A CLIP over clips of `config.frames` frames with adapters, and heads made for what is learned."""

    config: M2ClipConfig
    visual: VisionTransformer

    def __init__(self, config: M2ClipConfig) -> None:
        vision, text = cast(VitConfig, config.vision), config.text
        most = (vision.layers, text.layers + 1)
        if config.frames < 1 or not all(
            0 <= n <= m for n, m in zip((config.vision_adapters, config.text_adapters), most, strict=True)
        ):
            raise UsageError(
                f"A clip has one frame or more, and adapters stand in at most {most} blocks, got "
                f"{config.frames} frames and {config.vision_adapters} and {config.text_adapters} blocks."
            )
        if vision.grid[0] != vision.grid[1]:
            raise UsageError(f"TED adapters need a square grid of patches, got {vision.grid}.")
        ted = partial(TedAdapter, channels=config.vision_channels, frames=config.frames)
        plain = partial(TextAdapter, channels=config.text_channels)
        kinds = [*[AdaptedBlock] * text.layers, FusionBlock]
        *texts, fusion = adapted(kinds, config.text_adapters, plain, config.text_twice)
        images = adapted([AdaptedBlock] * vision.layers, config.vision_adapters, ted, config.vision_twice)
        super().__init__(config, block=in_turn(images), text_block=in_turn(texts))
        self.transformer.resblocks.append(
            fusion(text.width, text.heads, text.mlp_ratio, config.activation, causal=False)
        )
        self.frames = config.frames
        self.visual.t_adapter = TemporalAdapter(config.embed_dim, config.embed_dim // 2)
        self.visual.adapter_dropout = nn.Dropout(config.dropout)
        self.mlm_adapter: WordHead | None = None
        self.config = replace(config, classes=0, words=0)
        self.set_classes(config.classes)
        self.set_words(config.words)

    @property
    def fusion(self) -> FusionBlock:
        return cast(FusionBlock, self.transformer.resblocks[-1])

    def set_classes(self, count: int) -> None:
        """A new class head, drawn by torch's global generator; the old one stays where it fits."""
        if count != self.config.classes:
            head = nn.Linear(len(self.visual.class_embedding), count)
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.visual.adapter_fc = head.to(self.logit_scale.device)
            self.config = replace(self.config, classes=count)

    def set_words(self, count: int) -> None:
        """A new head for `count` words that may be hidden, which training alone uses."""
        if count != self.config.words:
            self.mlm_adapter = WordHead(self.config.text.width, count).to(self.logit_scale.device)
            self.config = replace(self.config, words=count)

    def train(self, mode: bool = True) -> Self:
        """The norms of a frozen convolutional stem do not move with what passes."""
        super().train(mode)
        self.visual.stem.train(mode and self.visual.conv1.weight.requires_grad)
        return self

    def look(self, batch: ClipBatch) -> Seen:
        """Clips of T frames through the image tower."""
        return self._seen(self.visual.embed(self.frames_of(batch).flatten(0, 1)))

    def look_at_picture(self, pixels_BCHW: Tensor) -> Seen:
        """A picture as a clip of T equal frames; they are embedded once."""
        return self._seen(self.visual.embed(pixels_BCHW).repeat_interleave(self.frames, dim=0))

    def _seen(self, x_FLD: Tensor) -> Seen:
        x_FLD, _ = self.visual.transformer(x_FLD)
        cls_BTD = x_FLD[:, 0].unflatten(0, (-1, self.frames))
        frames_BTE = self.visual.ln_post(cls_BTD) @ self.visual.proj
        return Seen(cast(nn.Module, self.visual.t_adapter)(frames_BTE), cls_BTD.mean(dim=1))

    def class_logits(self, seen: Seen) -> Tensor:
        """logits_BC of the class head; `Refusal` without one."""
        if not self.config.classes:
            raise Refusal(
                "This model has no class head yet.",
                hint="Train it (moviola train --task recognition), or compare with texts.",
            )
        head, dropout = (cast(nn.Module, getattr(self.visual, f"adapter_{n}")) for n in ("fc", "dropout"))
        return head(dropout(self.visual.ln_post(seen.cls_BD)))

    def word_logits(self, text_BLW: Tensor, frames_BTE: Tensor) -> Tensor:
        """logits_BLV of the word each token hides, from texts before their last norm and clips' frames."""
        if self.mlm_adapter is None:
            raise Refusal("This model has no head for hidden words.", hint="Training makes it: set_words(V).")
        if frames_BTE.shape[-1] != text_BLW.shape[-1]:
            frames_BTE = frames_BTE @ self.text_projection.T
        return self.mlm_adapter(self.ln_final(self.fusion.look(text_BLW, frames_BTE)))
