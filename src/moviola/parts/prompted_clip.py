"""A CLIP that may have learned prompts in both towers, those of one independent of the other's.

In the text they come after the start token, in the image behind the patches and without positions; block i,
1 <= i < depth, throws away what the block before made of them and takes vectors of its own. One tower each:
Zhou et al. 2021, arXiv 2109.01134, and Jia et al. 2022, arXiv 2203.12119; both at once: Rasheed et al. 2022,
arXiv 2212.03640 (ViFi-CLIP), and as a baseline Khattak et al. 2022, arXiv 2210.03117 (MaPLe).

Parameters: `ctx` and `visual.VPT` at the inputs, `VPT_shallow` of a block deeper; all others are CLIP's.

Axis letters: B pictures, N texts, C channels, L tokens, n prompt tokens, D width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from moviola.clip.blocks import Transformer
from moviola.clip.config import ClipConfig, build_config
from moviola.clip.keys import load_exact
from moviola.clip.model import CLIP
from moviola.parts.prompting import (
    embed_with_context,
    image_with_prompts,
    promptable,
    text_from_embeddings,
    with_places,
)
from moviola.types import Refusal, UsageError


@dataclass(frozen=True)
class PromptedConfig(ClipConfig):
    """A CLIP, and `n_*` prompt tokens in the first `depth_*` blocks of each tower; 0 and 0: none.

    `place`: the ids of the words whose place the text's prompts take; none: they are always inserted. New
    prompts that do not start as words are drawn from N(0, `std`).
    """

    n_vision: int = 0
    n_text: int = 0
    depth_vision: int = 0
    depth_text: int = 0
    place: tuple[int, ...] = ()
    std: float = 0.02

    def __post_init__(self) -> None:
        for side, count, depth, tower in (
            ("vision", self.n_vision, self.depth_vision, self.vision),
            ("text", self.n_text, self.depth_text, self.text),
        ):
            most = tower.layers if isinstance(tower.layers, int) else 0
            if min(count, depth) < 0 or (count > 0) != (depth > 0) or depth > most:
                raise UsageError(
                    f"n_{side} and depth_{side} are both 0, or both 1 or more and the depth at most {most}, "
                    f"the tower's blocks; got {count} and {depth}."
                )
        if self.place and len(self.place) != self.n_text:
            raise UsageError(f"{self.n_text} prompts cannot take the place of {len(self.place)} words.")
        if self.n_text and self.n_text + 2 >= self.text.context_length:
            raise UsageError(
                f"{self.n_text} prompts leave no room for words in {self.text.context_length} tokens."
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        made: Self = build_config(cls, {**data, **vars(ClipConfig.from_json(data))})
        return made

    @classmethod
    def over(cls, clip: ClipConfig, **options: Any) -> Self:
        """For this CLIP; prompts of a configuration of this kind are left out."""
        return cls(**vars(_plain(clip)), **options)


def _plain(config: ClipConfig) -> ClipConfig:
    return ClipConfig(**{name: getattr(config, name) for name in ClipConfig.__dataclass_fields__})


class PromptedClip(CLIP):
    """With no prompts a CLIP (`to_clip` gives it). Any text and any picture has a vector in either case."""

    config: PromptedConfig
    ctx: Tensor

    def __init__(self, config: PromptedConfig) -> None:
        super().__init__(PromptedConfig.over(config))
        if config.n_vision or config.n_text:
            self.add_prompts(**{k: v for k, v in vars(config).items() if k not in vars(_plain(config))})

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> Self:
        """Untrained, from the JSON form of its configuration."""
        return cls(PromptedConfig.from_json(data))

    @classmethod
    def from_clip(cls, clip: CLIP, **options: Any) -> Self:
        """This CLIP as it is; with options of `add_prompts`, new prompts in it."""
        if not isinstance(clip, CLIP):
            raise Refusal(f"{cls.__name__} starts from a CLIP; this model is a {type(clip).__name__}.")
        made = cls(PromptedConfig.over(clip.config))
        load_exact(made, clip.state_dict(), source="CLIP")
        if options:
            made.add_prompts(**options)
        return made.eval()

    def to_clip(self) -> CLIP:
        """The plain CLIP of the same weights; `Refusal` with prompts."""
        if self.prompted:
            raise Refusal(
                "A CLIP with prompts is no plain CLIP.", hint="Take the model from before they were learned."
            )
        made = CLIP(_plain(self.config))
        made.load_state_dict(self.state_dict())
        return made.eval()

    # -------------------------------------------------------------------------------------- prompts

    @property
    def prompted(self) -> bool:
        return bool(self.config.n_vision or self.config.n_text)

    def add_prompts(
        self,
        *,
        n_vision: int = 0,
        n_text: int = 0,
        depth_vision: int | None = None,
        depth_text: int | None = None,
        **options: Any,
    ) -> None:
        """Stage 2 begins: new prompts by the fields of the configuration; a depth of None is all blocks.

        Those of the text start as the words of `place` where these are given. `UsageError` where there are
        prompts already. Draws are torch's global ones.
        """
        if self.prompted:
            raise UsageError("This model has prompts already.", hint="Start from one without.")
        visual = promptable(self)[1] if n_vision else None
        blocks = {"vision": len(visual.transformer.resblocks) if visual else 0}
        blocks["text"] = len(self.transformer.resblocks) if n_text else 0
        self.config = config = replace(
            self.config,
            n_vision=n_vision,
            n_text=n_text,
            depth_vision=blocks["vision"] if depth_vision is None else depth_vision,
            depth_text=blocks["text"] if depth_text is None else depth_text,
            **options,
        )
        like = self.text_projection  # for the device and precision

        def prompt(transformer: Transformer, count: int, depth: int) -> nn.Parameter:
            drawn = [
                nn.Parameter(config.std * torch.randn(count, transformer.width).to(like))
                for _ in range(depth)
            ]
            for block, parameter in zip(transformer.resblocks[1:depth], drawn[1:], strict=True):
                block.register_parameter("VPT_shallow", parameter)
            return drawn[0]

        if n_text:
            self.ctx = prompt(self.transformer, n_text, config.depth_text)
            if config.place:
                place_n = torch.tensor(config.place, device=like.device)
                self.ctx.data.copy_(self.token_embedding(place_n).detach())
        if visual:
            visual.VPT = prompt(visual.transformer, n_vision, config.depth_vision)

    @property
    def context_length(self) -> int:
        """Tokens of a text, without the prompts'."""
        return super().context_length - self.config.n_text

    def train(self, mode: bool = True) -> Self:
        """A frozen image tower stays in eval mode."""
        super().train(mode)
        self.visual.train(mode and self.visual.conv1.weight.requires_grad)
        return self

    # --------------------------------------------------------------------------------------- towers

    def encode_text(self, tokens_NL: Tensor) -> Tensor:
        """tokens_NL of any texts -> text_NE, not normalised."""
        n = self.config.n_text
        if not n or not len(tokens_NL):
            return super().encode_text(tokens_NL)
        # no text goes on with padding after its start token: without a place, all get prompts inserted
        place_n = torch.tensor(self.config.place or (0,) * n, device=tokens_NL.device)
        tokens_NL, eot_N = with_places(self, tokens_NL, place_n)
        x_NLD = embed_with_context(self, tokens_NL, self.ctx)
        return text_from_embeddings(self, x_NLD, eot_N, deep=_deep(self.transformer, self.config.depth_text))

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """pixels_BCHW -> image_BE, not normalised."""
        if not self.config.n_vision:
            return super().encode_image(pixels_BCHW)
        visual = promptable(self)[1]
        deep = _deep(visual.transformer, self.config.depth_vision)
        return image_with_prompts(visual, pixels_BCHW, [cast(Tensor, visual.VPT), *deep])


def _deep(transformer: Transformer, depth: int) -> list[Tensor]:
    return [cast(Tensor, block.VPT_shallow) for block in transformer.resblocks[1:depth]]
