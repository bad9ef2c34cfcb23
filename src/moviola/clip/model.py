"""CLIP: an image tower and a text tower that meet in one space (Radford et al. 2021).

Parameters carry OpenAI's names, text tower at the root, image tower under `visual.`, so a released
state dict loads without renaming. Axis letters: B batch, T frames, N texts, M videos, L tokens,
D width, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.blocks import Block, ResidualBlock, TowerOutput, Transformer
from moviola.clip.config import Activation, ClipConfig, ResNetConfig, TextConfig
from moviola.clip.resnet import ModifiedResNet
from moviola.clip.vit import VisionTransformer
from moviola.types import ClipBatch, FrameSpec, UsageError


class TextTower(nn.Module):
    """The causal text transformer; pooled at the end-of-text token and projected."""

    def __init__(
        self, config: TextConfig, embed_dim: int, act: Activation, *, block: Block = ResidualBlock
    ) -> None:
        super().__init__()
        self.text_config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(
            config.width, config.layers, config.heads, config.mlp_ratio, act, causal=True, block=block
        )
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=config.width**-0.5)
        self.transformer.init_weights()

    def eot_positions(self, tokens_NL: Tensor) -> Tensor:
        """Where each text ends: the largest id, or the first `eot_id` where the config names one."""
        if self.text_config.eot_id is None:
            return tokens_NL.argmax(dim=-1)
        return (tokens_NL == self.text_config.eot_id).int().argmax(dim=-1)

    def embed_tokens(self, tokens_NL: Tensor) -> Tensor:
        length = tokens_NL.shape[1]
        if length > self.text_config.context_length:
            raise UsageError(
                f"The text tower takes at most {self.text_config.context_length} tokens, got {length}."
            )
        return self.token_embedding(tokens_NL) + self.positional_embedding[:length]

    def forward_text(self, tokens_NL: Tensor, taps: Sequence[int] = ()) -> TowerOutput:
        """Every token and tapped layer, over the whole length given."""
        x_NLD, layers = self.transformer(self.embed_tokens(tokens_NL), taps)
        x_NLD = self.ln_final(x_NLD)
        rows_N = torch.arange(len(x_NLD), device=x_NLD.device)
        pooled_ND = x_NLD[rows_N, self.eot_positions(tokens_NL)]
        return TowerOutput(pooled_ND @ self.text_projection, x_NLD, layers)

    def encode_text(self, tokens_NL: Tensor) -> Tensor:
        """tokens_NL -> text_NE, not normalised.

        Attention is causal, so what follows a text's end-of-text token cannot change its vector: it
        is cut off before the first block, and a batch of mixed lengths runs in groups of similar
        length (exact, and up to ten times faster on short queries).
        """
        if not len(tokens_NL):
            return self.forward_text(tokens_NL[:, :1]).vector_BD
        ends_N = self.eot_positions(tokens_NL) + 1
        groups = length_groups(ends_N.tolist())
        if len(groups) == 1:
            return self.forward_text(tokens_NL[:, : int(ends_N.max())]).vector_BD
        rows = [torch.tensor(group, device=tokens_NL.device) for group in groups]
        parts = [self.forward_text(tokens_NL[r, : int(ends_N[r].max())]).vector_BD for r in rows]
        return torch.cat(parts)[torch.cat(rows).argsort()]


def length_groups(lengths: Sequence[int], *, smallest: int = 32, groups: int = 4) -> list[list[int]]:
    """Rows split by length where that saves a quarter of the padded tokens; one group otherwise."""
    count = len(lengths)
    parts = min(groups, count // smallest)
    if parts < 2:
        return [list(range(count))]
    order = sorted(range(count), key=lengths.__getitem__)
    cuts = [count * p // parts for p in range(parts + 1)]
    split = [order[a:b] for a, b in pairwise(cuts)]
    padded = sum(len(group) * lengths[group[-1]] for group in split)
    return split if padded <= 0.75 * count * lengths[order[-1]] else [list(range(count))]


class CLIP(TextTower):
    """Both towers and the learned temperature. Implements `moviola.types.Encoder`.

    A video is the mean of its normalised frame vectors. `block` and `text_block` replace the block
    class of a tower.
    """

    has_text = True
    separable = True
    adaptation: Literal["none", "embedding", "classifier"] = "none"
    frame_spec = FrameSpec(count=None, sampler="middle", padding="mask")

    def __init__(
        self, config: ClipConfig, *, block: Block = ResidualBlock, text_block: Block = ResidualBlock
    ) -> None:
        super().__init__(config.text, config.embed_dim, config.activation, block=text_block)
        self.config = config
        self.visual: VisionTransformer | ModifiedResNet
        if isinstance(config.vision, ResNetConfig):
            self.visual = ModifiedResNet(config.vision, config.embed_dim)
        else:
            self.visual = VisionTransformer(config.vision, config.embed_dim, config.activation, block=block)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def dim(self) -> int:
        return self.config.embed_dim

    @property
    def context_length(self) -> int:
        return self.config.text.context_length

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """pixels_BCHW -> image_BE, not normalised."""
        return self.visual(pixels_BCHW).vector_BD

    def encode_frames(self, batch: ClipBatch) -> Tensor:
        """Each frame through the image tower: ClipBatch -> frames_BTE, not normalised."""
        frames_BTCHW = batch.frames_BTCHW
        return self.encode_image(frames_BTCHW.flatten(0, 1)).unflatten(0, frames_BTCHW.shape[:2])

    def encode_video(self, batch: ClipBatch) -> Tensor:
        return mean_of_frames(self.encode_frames(batch), batch.mask_BT)

    def pool(self, video: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        return video

    def score(self, text_ND: Tensor, video: Tensor, mask_MT: Tensor | None = None) -> Tensor:
        """Cosine times the logit scale: text_NE, video_ME -> scores_NM."""
        return self.logit_scale.exp() * F.normalize(text_ND, dim=-1) @ F.normalize(video, dim=-1).T

    def forward(self, pixels_BCHW: Tensor, tokens_NL: Tensor) -> tuple[Tensor, Tensor]:
        """Logits per image (B, N) and per text (N, B)."""
        logits_NB = self.score(self.encode_text(tokens_NL), self.encode_image(pixels_BCHW))
        return logits_NB.T, logits_NB


def mean_of_frames(frames_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Mean over valid frames of their normalised vectors: frames_BTD -> video_BD."""
    unit_BTD = F.normalize(frames_BTD, dim=-1)
    if mask_BT is None:
        return unit_BTD.mean(dim=1)
    weight_BT1 = mask_BT.to(unit_BTD.dtype).unsqueeze(-1)
    return (unit_BTD * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1).clamp_min(1)
