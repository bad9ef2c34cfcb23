"""Frozen in Time: a picture is a video of one frame, so both train one model, first with few frames.

The video tower is a ViT whose blocks attend over time and then over space. Its time attention starts as
zero and its positions in time are a table of which shorter clips use the first rows: a picture runs as in
an image ViT, and a model trained on one frame goes on with more. Texts pass DistilBERT, both sides are
projected to 256 numbers, and their cosine is the score, so videos can be indexed.

Bain, Nagrani, Varol, Zisserman: "Frozen in Time: A Joint Video and Image Encoder for End-to-End Retrieval",
ICCV 2021, arXiv 2104.00650. Official code: m-bain/frozen-in-time (MIT).

Symbols: sigma is `temperature`; tower: `parts.backbones.space_time_vit`; loss: `training.video_text`.

Known differences
- A clip shorter than the model is encoded with the frames it has; officially zero frames fill it up.
- Pictures and clips may share a batch; each kind is contrasted with its own alone, weighed by its rows.
  Officially a step has one kind; with batches of one kind the losses are equal.
- Frames are the middles of equal segments, also in training, where officially one is drawn from each;
  `frames=1` draws one of the clip's frames, as the official training with one frame does.
- Time attention always starts as zero (officially not in a model built with one frame), and its output map
  as random, not ones, which the next norm undoes so that no gradient comes back (see the tower's block).
- Pictures are scaled to the tower's size once, not to 8/7 of it, cropped and scaled again.
- The last block computes the class token only: exact. Test-time averaging over windows is left out.
- Only DistilBERT is read as text tower; officially any BERT of the library may be.
- Equation numbers are not cited: this file was written from the official code, not from the paper.

Axis letters: B clips, T frames, N texts, M videos, L tokens, D embedding width, C, H, W of the pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.config import VitConfig, build_config
from moviola.clip.keys import Rule
from moviola.clip.native import assign
from moviola.clip.weights import strip_prefix
from moviola.data import clips_and_stills as joint
from moviola.data import order_clips as world
from moviola.parts.backbones.hf_text import HfTextConfig, distilbert, distilbert_of
from moviola.parts.backbones.space_time_vit import Growth, SpaceTimeVit, grown_table
from moviola.parts.joint_towers import JointTowers
from moviola.parts.timm_vit import Shapes, TimmKeys, timm_rules
from moviola.training.brief import fit
from moviola.training.video_text import VideoText, fewer_frames, similarity
from moviola.types import (
    Batch,
    CheckpointError,
    Claim,
    ClipBatch,
    Example,
    FrameSpec,
    Refusal,
    Training,
    UsageError,
)

Projection = Literal["minimal", "none"]


@dataclass(frozen=True)
class Config:
    """ViT-B/16 for up to 4 frames beside DistilBERT-base, which meet in 256 numbers.

    `projection`: `minimal` is a linear map each, the text's after a ReLU; `none` needs towers of one width.
    """

    vision: VitConfig = field(default_factory=lambda: VitConfig(patch_size=16))
    text: HfTextConfig = field(default_factory=distilbert)
    frames: int = 4
    embed_dim: int = 256
    projection: Projection = "minimal"
    temperature: float = 0.05

    def __post_init__(self) -> None:
        if self.projection not in get_args(Projection):
            raise UsageError(f"The projection is minimal or none, got {self.projection!r}.")
        if self.projection == "none" and {self.vision.width, self.text.width} != {self.embed_dim}:
            raise UsageError(
                f"Without projections towers and embedding have one width, got {self.vision.width}, "
                f"{self.text.width} and {self.embed_dim}."
            )
        if not self.temperature > 0:
            raise UsageError(f"The temperature must be positive, got {self.temperature}.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Config:
        parts = {
            "vision": build_config(VitConfig, data["vision"]),
            "text": HfTextConfig.from_json(data["text"]),
        }
        return cast(Config, build_config(cls, {**data, **parts}))


def b_16_8f() -> Config:
    return Config(frames=8)


def small() -> Config:
    """To train on one computer: a ViT with a convolutional stem for 64 pixels, a BERT for built-in words."""
    vision = VitConfig(64, 8, width=128, layers=4, heads=4, stem=((32, 0), (64, 1)))
    text = replace(distilbert(), vocab_size=8192, width=128, layers=3, heads=4, hidden=512, positions=77)
    return Config(vision, replace(text, context_length=77), embed_dim=128)


class FrozenInTime(JointTowers):
    """Videos of 1 to `frames` frames, pictures and texts in one space. Implements `moviola.types.Encoder`.

    Every clip is encoded with the frames its mask says it has.
    """

    config: Config

    def __init__(self, config: Config) -> None:
        tower = SpaceTimeVit(config.vision, config.frames)
        super().__init__(config, tower, projected=config.projection == "minimal")

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> FrozenInTime:
        """Untrained, from the JSON form of its configuration."""
        return cls(Config.from_json(data))

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], config: Config | None = None) -> FrozenInTime:
        """The authors' checkpoint; without `config` sizes follow from the shapes, heads are 64 wide."""
        state = strip_prefix(dict(state), "module.")
        made = cls(config or _config_of(state))
        assign(made, KEYS.from_official(state), source="Frozen-in-Time checkpoint")
        return made.eval()

    @classmethod
    def from_towers(
        cls, image: Mapping[str, Tensor], text: Mapping[str, Tensor], config: Config | None = None
    ) -> FrozenInTime:
        """What the paper's training starts from: timm's image ViT and the library's DistilBERT.

        Projections are new, time attention and positions in time zero. Heads of either are left out.
        """
        made = cls(config or Config())
        new = ("txt_proj", "vid_proj", "temporal_embedding", ".ln_time.", ".time_attn.")
        made.start_towers(image, text, KEYS, new)
        return made.eval()

    @property
    def frame_spec(self) -> FrameSpec:
        return FrameSpec(self.config.frames, "middle", "mask")

    def encode_frames(self, frames_BTCHW: Tensor) -> Tensor:
        """Clips of equally many frames, up to `frames`: video_BD, not normalised."""
        return cast(Tensor, self.vid_proj(self.video_model.vector(frames_BTCHW)))

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        return self.encode_frames(pixels_BCHW.unsqueeze(1))

    def encode_video(self, batch: ClipBatch) -> Tensor:
        """video_BD; clips with equally many real frames run together."""
        real_B = batch.mask_BT.sum(1)
        counts = sorted(set(real_B.tolist()))
        if counts in ([], [batch.frames_BTCHW.shape[1]]):
            return self.encode_frames(batch.frames_BTCHW)
        if counts[0] == 0:
            raise UsageError("A clip without a real frame (mask all False) has no vector.")
        rows = [(real_B == count).nonzero()[:, 0] for count in counts]
        parts = [
            self.encode_frames(batch.frames_BTCHW[r][batch.mask_BT[r]].unflatten(0, (len(r), count)))
            for r, count in zip(rows, counts, strict=True)
        ]
        return torch.cat(parts)[torch.cat(rows).argsort()]


def grow_frames(model: FrozenInTime, frames: int, mode: Growth = "zeros") -> FrozenInTime:
    """A copy for clips of up to `frames` frames; fewer cut the table of positions in time.

    `zeros` leaves what the model says of clips it already took bit for bit. `interp` and `bilinear` stretch
    the table instead, so that the last frame keeps its place (`space_time_vit.grown_table`).
    """
    made = FrozenInTime(replace(model.config, frames=frames))
    state = model.state_dict()
    name = "video_model.temporal_embedding"
    made.load_state_dict(state | {name: grown_table(state[name], frames, mode)})
    return made.to(state[name]).train(model.training)


_BLOCK, _OFFICIAL_BLOCK = "video_model.transformer.resblocks.{n}.", "video_model.blocks.{n}."
KEYS = TimmKeys(
    *timm_rules("video_model."),
    Rule("video_model.temporal_embedding", "video_model.temporal_embed"),
    Rule(_BLOCK + "ln_time.{rest}", _OFFICIAL_BLOCK + "norm3.{rest}"),
    Rule(_BLOCK + "time_attn.in_proj_weight", _OFFICIAL_BLOCK + "timeattn.qkv.weight"),
    Rule(_BLOCK + "time_attn.in_proj_bias", _OFFICIAL_BLOCK + "timeattn.qkv.bias"),
    Rule(_BLOCK + "time_attn.out_proj.{rest}", _OFFICIAL_BLOCK + "timeattn.proj.{rest}"),
    Rule("text_model.transformer.{rest}", "text_model.{rest}"),
    Rule("txt_proj.{rest}", "txt_proj.{rest}"),
    Rule("vid_proj.{rest}", "vid_proj.{rest}"),
    ignore=("text_model.embeddings.position_ids",),
)
"""Without the `module.` that published files begin every name with."""


def _config_of(state: Mapping[str, Tensor]) -> Config:
    if "text_model.pooler.dense.weight" in state:
        raise CheckpointError("The text tower of this checkpoint is a BERT; only DistilBERT is read.")
    shapes = Shapes(state)
    vision, text = shapes.timm_vit("video_model."), distilbert_of(shapes, "text_model.")
    frames = shapes("video_model.temporal_embed")[1]
    if "vid_proj.0.weight" not in state:
        return Config(vision, text, frames, vision.width, "none")
    return Config(vision, text, frames, shapes("vid_proj.0.weight")[0])


def _start(module: nn.Module) -> nn.Module:
    if isinstance(module, FrozenInTime):
        return module
    raise Refusal(
        f"Frozen-in-Time cannot start from a {type(module).__name__}: its image tower is timm's ViT, without "
        "a norm before the blocks, its text tower a DistilBERT.",
        hint="Train a new one (--model frozen-small), or go on with a trained one (--init FOLDER).",
    )


TRAINING = Training(
    VideoText,
    start=_start,
    presets={"frozen-b-16": Config, "frozen-b-16-8f": b_16_8f, "frozen-small": small},
    recipe={"lr": 3e-5, "lr_floor": 1.0, "warmup": 0, "batch_size": 32, "betas": (0.9, 0.999), "eps": 1e-6},
)


def tiny() -> Config:
    text = replace(distilbert(), vocab_size=32, width=16, layers=1, heads=2, hidden=32, positions=8)
    text = replace(text, context_length=8, dropout=0.0)
    return Config(VitConfig(16, 8, width=16, layers=2, heads=2), text, frames=3, embed_dim=12)


def example(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FrozenInTime(tiny()).eval()
        for name, parameter in model.named_parameters():
            if "time_attn" in name or "temporal" in name:
                nn.init.normal_(parameter, std=0.2)
    objective = VideoText(model).eval()

    def run(clip: ClipBatch, tokens_BL: Tensor) -> dict[str, Tensor]:
        video_BD, text_BD = model.encode_video(clip), model.encode_text(tokens_BL)
        losses = objective(model, {"clip": clip, "text": tokens_BL})
        scores_BB = model.score(text_BD, video_BD)
        return {"video": video_BD, "text": text_BD, "scores": scores_BB, "loss": losses["contrastive"]}

    mask_BT = torch.arange(3) < torch.tensor([2, 3, 1, 2, 1, 3, 2])[:, None]
    frames_BTCHW = torch.randn(7, 3, 3, 16, 16, generator=generator)
    tokens_BL = torch.randint(1, 32, (7, 8), generator=generator)
    inputs = {"clip": ClipBatch(frames_BTCHW, mask_BT.cumsum(1).float(), mask_BT), "tokens_BL": tokens_BL}
    shapes = {"video": (7, 12), "text": (7, 12), "scores": (7, 7), "loss": ()}
    return Example(run, inputs, shapes, model, ("clip", "tokens_BL", "video", "text"), "loss")


_FRAMES, _CLIPS, _PICTURES = 4, 2133, 800
# frames a clip in the first and in the second part of training, and how many pictures there are
_ARMS = {
    "1 frame": (1, 1, _PICTURES),
    "1 frame, videos only": (1, 1, 0),
    "all frames from the start": (_FRAMES, _FRAMES, _PICTURES),
    "shuffled frames": (1, _FRAMES, _PICTURES),
    "curriculum": (1, _FRAMES, _PICTURES),
}


class _OnRows(VideoText):
    """The objective on rows of `data.clips_and_stills`, whose texts repeat by design."""

    def outputs(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        clip = ClipBatch(batch["frames"], batch["mask"].float(), batch["mask"])
        return super().outputs(model, {"clip": clip, "text": batch["text"]})

    def _warn_of_repeats(self, caption_N: Tensor) -> None:
        return


def _fit(model: FrozenInTime, rows: Mapping[str, Tensor], frames: int, steps: int, seed: int) -> None:
    fit(model, _OnRows(model, frames=frames), rows, steps=steps, batch=64, lr=1e-3, seed=seed)


@lru_cache(maxsize=3)
def _begun(seed: int, frames: int, pictures: int, steps: int) -> FrozenInTime:
    """A new small model after the first part of training; the arms that begin alike share it."""
    vision = VitConfig(world.SIDE, 16, width=64, layers=2, heads=2, stem=((16, 0), (32, 0)))
    words, length = world.vocabulary_size(), world.CONTEXT_LENGTH
    text = replace(
        tiny().text, vocab_size=words, width=48, hidden=96, positions=length, context_length=length
    )
    torch.manual_seed(seed)
    model = FrozenInTime(Config(vision, text, _FRAMES, embed_dim=48))
    _fit(model, joint.rows(seed, _CLIPS, pictures, frames=_FRAMES), frames, steps, seed)
    return model


def run_claim(arm: str, seed: int, *, first: int = 250, second: int = 350) -> dict[str, float]:
    """Train one arm in two parts; tell actions from their reverse, and name things that no clip showed."""
    begin, end, pictures = _ARMS[arm]
    test, shuffled = world.order_clips(seed, 400, split="test", frames=_FRAMES), arm == "shuffled frames"
    rows = joint.rows(seed, _CLIPS, pictures, frames=_FRAMES, shuffled=shuffled)
    with torch.random.fork_rng(devices=[]):
        model = copy.deepcopy(_begun(seed, begin, pictures, first))
        _fit(model, rows, end, second, seed + 1000)
    frames_MTCSS, label_M, thing_M = joint.held_clips(seed, 800, frames=_FRAMES)

    def encode(frames_NTCSS: Tensor) -> Tensor:
        batches = (fewer_frames(world.clip_batch(part), end, draw=False) for part in frames_NTCSS.split(100))
        return F.normalize(torch.cat([model.encode_video(batch) for batch in batches]), dim=-1)

    with torch.inference_mode():
        video_ND = encode((test.shuffled(seed + 1) if shuffled else test).pixels())
        scores_NC = similarity(video_ND, model.encode_text(world.tokens(world.ACTIONS)))
        named = joint.appearance_accuracy(encode(frames_MTCSS), label_M, thing_M, model.encode_text)
    parts = ((first, begin), (second, end))
    seen = sum(steps * 64 * float(rows["mask"].sum(1).clamp(max=k).float().mean()) for steps, k in parts)
    return {
        "pair accuracy": world.pair_accuracy(scores_NC, test.label_N),
        "new things in clips, top-1": named,
        "thousand frames trained on": seen / 1000,
    }


CLAIM = Claim(
    statement="One frame first and more later tells what happens when, for less work than all frames always.",
    data="order clips of 4 frames, 12 of 16 things; pictures of all; test clips of new things and speeds",
    metric="pair accuracy",
    arms=tuple(_ARMS),
    ours="curriculum",
    baseline="1 frame",
    run=run_claim,
)
