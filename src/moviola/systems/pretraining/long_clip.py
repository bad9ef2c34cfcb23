"""Long-CLIP: a CLIP that reads 248 tokens, in the same space and with the same calls.

CLIP has 77 text positions, and of these only about the first 20 are well trained, since most captions
are short. Long-CLIP keeps those 20 as they are and stretches the other 57 four times by linear
interpolation, then trains on long captions. So that short captions keep working, each picture is also
matched with the first sentence of its caption; a summary does not tell everything, so there the picture's
vector is first reduced to the strongest components of the batch.

Zhang, Zhang, Dong, Zang, Wang: "Long-CLIP: Unlocking the Long-Text Capability of CLIP", ECCV 2024,
arXiv 2403.15378. Official code: beichenzbc/Long-CLIP (Apache-2.0).

Symbols: `positional_embedding` and `positional_embedding_res` are the authors' two tables, of which rows
before `keep` come from the first (frozen) and the others from the second (trained); `stretch_positions`
is the loop in `load_from_clip`; `parts.projection.primary_components` is `PCA`.

Known differences
- Any CLIP is converted, any length, `keep` and whole ratio: new length = keep + ratio * (old - keep).
- The authors cast the table to half precision before stretching. Here it stays in the precision it
  has; `half_precision_table=True` rounds as they do.
- Texts of any width up to the context length are read; the authors need 248 ids.
- The components are those of the whole batch over all processes; the authors take them in each process
  by itself, as `official_distributed=True` does.
- Where the centred pictures span no more than `components` directions there is nothing to leave out, so
  the vectors stay as they are; the authors' gradient is then NaN or noise. Elsewhere the gradient is
  that of the projection, which needs no gap between two kept directions, as SVD's does.
- AdamW's decay leaves out vectors, scalars and position tables; the authors decay everything. The logit
  scale is held at 100 or less; the authors start at 100 and let it go.
- Equation numbers are not cited: this file was written from the official code, not from the paper.

Axis letters: B pictures, N texts, L tokens, D width, E embedding width, K and M rows kept and stretched.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.blocks import Block, ResidualBlock
from moviola.clip.config import ClipConfig, TextConfig, VitConfig, vit_b_16, vit_l_14
from moviola.clip.formats.common import scalar_logit_scale
from moviola.clip.formats.openai import infer_config
from moviola.clip.formats.openclip import plain_names
from moviola.clip.keys import Keys, Rule, check_exact
from moviola.clip.model import CLIP
from moviola.data import framed
from moviola.parts.projection import primary_components
from moviola.training.brief import fit
from moviola.training.nce import info_nce
from moviola.training.objectives import BasePairObjective, Contrastive
from moviola.types import (
    Batch,
    Claim,
    Example,
    Needs,
    PictureField,
    TextField,
    Training,
    UsageError,
)

Clip = TypeVar("Clip", bound=CLIP)
KEEP, RATIO, CLIP_LENGTH = 20, 4, 77


@dataclass(frozen=True)
class LongClipConfig(ClipConfig):
    """A CLIP of `text.context_length` positions, whose first `keep` are frozen."""

    text: TextConfig = field(default_factory=lambda: TextConfig(context_length=248))
    keep: int = KEEP

    def __post_init__(self) -> None:
        if not 0 <= self.keep < (length := self.text.context_length):
            raise UsageError(f"A text tower of {length} positions cannot keep the first {self.keep}.")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LongClipConfig:
        return cls.of(ClipConfig.from_json(data), keep=data["keep"])

    @classmethod
    def of(cls, clip: ClipConfig, *, keep: int, context_length: int | None = None) -> LongClipConfig:
        """This CLIP's configuration with another context length."""
        text = replace(clip.text, context_length=context_length or clip.text.context_length)
        return cls(clip.embed_dim, clip.vision, text, clip.activation, keep)

    def plain(self) -> ClipConfig:
        return ClipConfig(self.embed_dim, self.vision, self.text, self.activation)


Config = LongClipConfig


def long_clip_b_16() -> LongClipConfig:
    """The authors' LongCLIP-B, from OpenAI's ViT-B/16."""
    return LongClipConfig.of(vit_b_16(), keep=KEEP, context_length=248)


def long_clip_l_14() -> LongClipConfig:
    """The authors' LongCLIP-L, from OpenAI's ViT-L/14."""
    return LongClipConfig.of(vit_l_14(), keep=KEEP, context_length=248)


def stretched_length(length: int, *, keep: int = KEEP, ratio: int = RATIO) -> int:
    return keep + ratio * (length - keep)


def stretch_positions(table_LD: Tensor, *, keep: int = KEEP, ratio: int = RATIO) -> Tensor:
    """The first `keep` rows as they are, the others `ratio` times as many by linear interpolation.

    The last row has no successor: it is continued in the direction in which it was reached. Computed in
    the table's own precision. `UsageError` for a table that `keep` leaves nothing of, or a ratio below 1.
    """
    length = len(table_LD)
    if table_LD.ndim != 2 or length < 2 or not 0 <= keep < length or ratio < 1:
        raise UsageError(
            f"A table of positions {tuple(table_LD.shape)} cannot keep {keep} rows and stretch the rest "
            f"{ratio} times.",
            hint="keep must be below the context length, and ratio a whole number of at least 1.",
        )
    here_MD = table_LD[keep:]
    parts = [here_MD]
    for step in range(1, ratio):
        between_MD = (ratio - step) * here_MD[:-1] / ratio + step * here_MD[1:] / ratio
        end_1D = table_LD[-1:] + step * (table_LD[-1:] - table_LD[-2:-1]) / ratio
        parts.append(torch.cat([between_MD, end_1D]))
    return torch.cat([table_LD[:keep], torch.stack(parts, dim=1).flatten(0, 1)])


class LongClip(CLIP):
    """A CLIP with two tables of text positions. Implements `moviola.types.Encoder`."""

    config: LongClipConfig

    def __init__(
        self, config: LongClipConfig, *, block: Block = ResidualBlock, text_block: Block = ResidualBlock
    ) -> None:
        super().__init__(config, block=block, text_block=text_block)
        self.positional_embedding.requires_grad_(False)
        self.positional_embedding_res = nn.Parameter(self.positional_embedding.detach().clone())

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> LongClip:
        """Untrained, from the JSON form of its configuration."""
        return cls(LongClipConfig.from_json(data))

    @classmethod
    def from_clip(
        cls, clip: CLIP, *, keep: int = KEEP, ratio: int = RATIO, half_precision_table: bool = False
    ) -> LongClip:
        """This CLIP for longer texts; its weights are copied. Untrained, it reads short texts as before.

        `half_precision_table` rounds the table as the authors' conversion does. `UsageError` for what is
        no plain CLIP or is stretched already.
        """
        if not isinstance(clip, CLIP):
            raise UsageError(f"Long-CLIP starts from a CLIP, got {type(clip).__name__}.")
        # a plain CLIP of just the stretched length is what `to_clip` gives
        length = stretched_length(CLIP_LENGTH, keep=keep, ratio=ratio)
        if isinstance(clip, LongClip) or clip.context_length == length > CLIP_LENGTH:
            raise UsageError(
                f"This model is stretched already, to {clip.context_length} tokens.",
                hint="Use it as it is, or start from the CLIP it was made from.",
            )
        state = {name: tensor.detach().clone() for name, tensor in clip.state_dict().items()}
        old_LD = state["positional_embedding"]
        rounded_LD = old_LD.half() if half_precision_table else old_LD
        new_LD = stretch_positions(rounded_LD, keep=keep, ratio=ratio).to(old_LD)
        state |= {"positional_embedding": new_LD, "positional_embedding_res": new_LD.clone()}
        return _filled(cls, LongClipConfig.of(clip.config, keep=keep, context_length=len(new_LD)), state)

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], *, keep: int = KEEP) -> LongClip:
        """The authors' checkpoint. The configuration follows from the shapes, heads being 64 wide."""
        state = KEYS.from_official(plain_names(state))
        config = LongClipConfig.of(infer_config(state, source="The Long-CLIP checkpoint"), keep=keep)
        return _filled(cls, config, scalar_logit_scale({k: v.float() for k, v in state.items()}))

    def to_clip(self) -> CLIP:
        """A plain CLIP of the same context length, with one table: for other programs, not for training."""
        state = {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
        del state["positional_embedding_res"]
        state["positional_embedding"] = self.positions(self.context_length).detach()
        return _filled(CLIP, self.config.plain(), state)

    def positions(self, length: int) -> Tensor:
        """The first `length` rows of both tables as one: (length, D)."""
        keep = self.config.keep
        kept_KD = self.positional_embedding[: min(keep, length)].detach()
        return torch.cat([kept_KD, self.positional_embedding_res[keep : max(keep, length)]])

    def embed_tokens(self, tokens_NL: Tensor) -> Tensor:
        length = tokens_NL.shape[1]
        if length > self.context_length:
            raise UsageError(f"The text tower takes at most {self.context_length} tokens, got {length}.")
        return self.token_embedding(tokens_NL) + self.positions(length)


def _filled(kind: type[Clip], config: Any, state: Mapping[str, Tensor]) -> Clip:
    """A model of this kind that holds these tensors themselves."""
    with torch.device("meta"):
        made = kind(config)
    check_exact(made, state, source="Long-CLIP")
    made.load_state_dict(state, assign=True)
    return made.eval()


class LongClipObjective(BasePairObjective):
    """The whole caption with the picture, and its first sentence with the picture's primary components.

    Batch fields `image`, `text` and `text_short`. `components` 0 leaves the matching out, `short_weight`
    weighs the short captions' part, `logit_scale` is where the temperature starts (None: as the model
    has it). `official_distributed` takes the components of each process by itself.
    """

    needs: Needs = Needs((PictureField(), TextField(), TextField("text_short", cut="first-sentence")))

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        components: int = 32,
        short_weight: float = 1.0,
        smoothing: float = 0.1,
        logit_scale: float | None = 100.0,
        official_distributed: bool = False,
        weight_decay: float = 1e-2,
        max_logit_scale: float = 100.0,
    ) -> None:
        super().__init__(model, weight_decay=weight_decay, max_logit_scale=max_logit_scale)
        if components < 0 or short_weight < 0 or not 0 <= smoothing < 1:
            raise UsageError(
                f"components and short_weight must not be negative and smoothing lies in [0, 1), got "
                f"{components}, {short_weight} and {smoothing}."
            )
        if logit_scale is not None and not 1 <= logit_scale <= max_logit_scale:
            raise UsageError(f"logit_scale lies between 1 and {max_logit_scale}, got {logit_scale}.")
        self.components, self.short_weight, self.smoothing = components, short_weight, smoothing
        self.official_distributed = official_distributed
        self._warned = False
        if logit_scale is not None and model is not None:
            with torch.no_grad():
                cast(Tensor, model.logit_scale).fill_(math.log(logit_scale))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        towers, image, long, short = cast(Any, model), batch["image"], batch["text"], batch["text_short"]
        if not len(image) == len(long) == len(short):
            raise UsageError(
                f"Every picture needs a long and a short caption, got {len(image)} pictures, {len(long)} "
                f"long and {len(short)} short captions."
            )
        made = {
            "image": F.normalize(towers.encode_image(image).float(), dim=-1),
            "text": F.normalize(towers.encode_text(long).float(), dim=-1),
            "text_short": F.normalize(towers.encode_text(short).float(), dim=-1),
            "logit_scale": towers.logit_scale,
        }
        if self.official_distributed:
            many = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if many else 0
            made["process"] = torch.full((len(image),), rank, device=image.device)
        return made

    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        image_BE, scale = outputs["image"], outputs["logit_scale"].exp()
        if len(image_BE) < 2:
            raise UsageError("A contrastive loss needs at least two pairs.", hint="Raise the batch size.")
        matched_BE = self._matched(image_BE, outputs.get("process"))
        long = info_nce(image_BE, outputs["text"], scale, smoothing=self.smoothing)
        short = info_nce(matched_BE, outputs["text_short"], scale, smoothing=self.smoothing)
        return {"long": long, "short": self.short_weight * short}

    def _matched(self, image_BE: Tensor, process_B: Tensor | None) -> Tensor:
        # vectors that are not finite go on as they are: the loss says so, and the run names the rows
        if not self.components or not bool(image_BE.isfinite().all()):
            return image_BE
        if process_B is None:
            parts = [torch.arange(len(image_BE), device=image_BE.device)]
        else:
            parts = [torch.nonzero(process_B == rank)[:, 0] for rank in process_B.unique()]
        least, width = min(map(len, parts)), image_BE.shape[1]
        if min(least - 1, width) <= self.components and not self._warned:
            self._warned = True
            warnings.warn(
                f"{least} pictures of {width} numbers have no more than {self.components} components, so "
                "none is left out: raise the batch size, or lower the option `components`.",
                stacklevel=2,
            )
        matched = torch.cat([primary_components(image_BE[rows], self.components) for rows in parts])
        return matched[torch.cat(parts).argsort()]


TRAINING = Training(
    LongClipObjective,
    start=lambda module: module if isinstance(module, LongClip) else LongClip.from_clip(cast(CLIP, module)),
    presets={"long-clip-b-16": long_clip_b_16, "long-clip-l-14": long_clip_l_14},
    recipe={"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "warmup": 200},
)

KEYS = Keys(Rule("{rest}", "{rest}"), ignore=("input_resolution", "context_length", "vocab_size"))
"""The house's names are OpenAI's and the authors'; numbers that archives carry are not weights."""


def tiny() -> LongClipConfig:
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2)
    text = TextConfig(context_length=12, vocab_size=32, width=16, layers=1, heads=2)
    return LongClipConfig(16, vision, text, keep=4)


def example(seed: int) -> Example:
    generator, objective = torch.Generator().manual_seed(seed), LongClipObjective(components=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LongClip(tiny()).eval()

    def run(pixels_BCHW: Tensor, tokens_BL: Tensor, short_BL: Tensor) -> dict[str, Tensor]:
        outputs = objective.outputs(model, {"image": pixels_BCHW, "text": tokens_BL, "text_short": short_BL})
        loss = torch.stack(list(objective.loss(model, outputs).values())).sum()
        named = {name: outputs[name] for name in ("image", "text", "text_short")}
        return named | {"components": primary_components(outputs["image"], 2), "loss": loss}

    tokens_BL = torch.randint(1, 30, (6, 12), generator=generator)
    short_BL = tokens_BL[:, :5].clone()
    tokens_BL[:, -1] = short_BL[:, -1] = 31
    pixels_BCHW = torch.randn(6, 3, 16, 16, generator=generator)
    inputs = {"pixels_BCHW": pixels_BCHW, "tokens_BL": tokens_BL, "short_BL": short_BL}
    shapes = dict.fromkeys(("image", "text", "text_short", "components"), (6, 16)) | {"loss": ()}
    batched = (*inputs, "image", "text", "text_short")
    return Example(run, inputs, shapes, model, batched, "loss")


_OLD, _KEEP = 16, 10  # the claim's CLIP and what it keeps; stretched four times it reads 34 tokens
_COMPONENTS, _STEPS = 16, 200
_fit = partial(fit, batch=64, lr=1.5e-3)


@lru_cache(maxsize=3)
def _short_clip(seed: int) -> tuple[CLIP, framed.Framed]:
    """A CLIP trained on captions of its own length, three of four short, and the pictures it saw."""
    torch.manual_seed(seed)
    made, model = framed.framed(seed, 8000), CLIP(framed.towers(_OLD))
    data = made.tensors(_OLD)
    short_NL = data.pop("text_short")
    data["text"] = torch.where(torch.arange(len(made))[:, None] % 4 > 0, short_NL, data["text"])
    _fit(model, Contrastive(model), data, steps=300, seed=seed)
    return model, made


def run_claim(arm: str, seed: int, *, steps: int = _STEPS, gallery: int = 500) -> dict[str, float]:
    """Train a short CLIP on with long captions; ask new pictures for what these tell last.

    `truncated` is that CLIP and its own objective, the captions cut to its 16 tokens; `interpolated`
    spreads all positions alike and trains them all; `without components` matches the short captions with
    the pictures' whole vectors.
    """
    clip, made = _short_clip(seed)
    test = framed.framed(seed + 1000, gallery)
    before = framed.measure(clip, test)["short t2i R@1"]
    model: CLIP = LongClip.from_clip(clip, keep=_KEEP)
    components = 0 if arm == "without components" else _COMPONENTS
    objective: BasePairObjective = LongClipObjective(model, components=components, logit_scale=None)
    if arm == "truncated":
        model, objective = deepcopy(clip), Contrastive()
    elif arm == "interpolated":
        old_1DL, model = clip.positional_embedding.detach().T[None], cast(LongClip, model).to_clip()
        spread_1DL = F.interpolate(old_1DL, model.context_length, mode="linear", align_corners=True)
        model.positional_embedding = nn.Parameter(spread_1DL[0].T.contiguous())
    _fit(model, objective, made.tensors(model.context_length), steps=steps, seed=seed + 1)
    return framed.measure(model, test) | {"short t2i R@1 before": before}


CLAIM = Claim(
    statement="Stretched and trained on long captions, a CLIP uses what its old context would have cut off.",
    data="made pictures: a thing in a frame of two colours, 8,000 to learn from and 500 new ones",
    metric="late attribute, %",
    arms=("truncated", "interpolated", "without components", "long-clip"),
    ours="long-clip",
    baseline="truncated",
    run=run_claim,
)
