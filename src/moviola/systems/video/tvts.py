"""TVTS: a video transformer learns what happens when by sorting the transcripts of a video's parts.

Four segments of an untrimmed video, one after the other, are one clip. A small head reads the clip's
tokens and the features of the four transcripts, and says of each transcript which segment it belongs to.
It is trained beside the contrast of the clip with the mean of its transcripts. Most patches are dropped in
training. Only the towers are used afterwards, so videos can be indexed and probed.

Zeng, Ge, Liu, Chen, Luo, Xia, Ge: "Learning Transferable Spatiotemporal Representations from Natural Script
Knowledge", CVPR 2023, arXiv 2209.15280. Official code: TencentARC/TVTS, folder `v1` (its own licence is not
stated).

Symbols: sigma is `temperature`; tower: `parts.backbones.tubelet_vit`; data: `types.ScriptField`.

Known differences
- Words of a segment are the transcript's as they are: the authors' denoised words, and their alignment to the
  timed ones by dynamic time warping, are a preparation of data that is left out.
- Segments of 3 to 5 seconds have any length between, officially 3, 4 or 5. A segment without words is drawn
  anew and then refused; officially it trains as an empty text (an exception is made but not raised).
- Rows with one caption may stand in a batch of scripts; the sort term is weighed by the scripts' share.
  Officially a step has one kind; with batches of one kind the losses are equal. They drop patches too
  (officially none): set `keep=1` for a run of captions.
- A picture is two equal frames, one tube, as in the official training with pictures.
- Frames are scaled and their centre is kept, also in training, where officially a random crop is.
- The last block computes the class token only where nothing else is asked for: exact.
- Texts have 50 tokens at most, officially so in training.
- Equation numbers are not cited: this file was written from the official code, not from the paper.

Axis letters: B clips, T frames, U tubes, K patches kept, S segments, N texts, L tokens, D width, C channels,
H, W of the pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.blocks import Transformer
from moviola.clip.config import VitConfig, build_config
from moviola.clip.keys import Rule
from moviola.clip.native import assign
from moviola.clip.weights import strip_prefix
from moviola.data import order_clips as world
from moviola.parts.backbones.hf_text import HfTextConfig, distilbert, distilbert_of
from moviola.parts.backbones.tubelet_vit import TubeletViT
from moviola.parts.joint_towers import JointTowers
from moviola.parts.linear_head import linear_probe
from moviola.parts.timm_vit import EPSILON, PlainBlock, Shapes, TimmKeys, timm_rules
from moviola.training.brief_rows import fit_rows
from moviola.training.script_sorting import ScriptSorting
from moviola.types import (
    Batch,
    Claim,
    ClipBatch,
    Example,
    FrameSpec,
    Refusal,
    Training,
    UsageError,
)

_TEXT_TOKENS = 50


@dataclass(frozen=True)
class Config:
    """ViT-B/16 over 16 frames in tubelets of two, DistilBERT-base, and a head that sorts four segments."""

    vision: VitConfig = field(default_factory=lambda: VitConfig(patch_size=16))
    text: HfTextConfig = field(default_factory=lambda: replace(distilbert(), context_length=_TEXT_TOKENS))
    frames: int = 16
    tubelet: int = 2
    embed_dim: int = 256
    segments: int = 4
    sort_layers: int = 2
    sort_heads: int = 12
    temperature: float = 0.05

    def __post_init__(self) -> None:
        if self.vision.width != self.text.width:
            raise UsageError(
                "The sorting head reads both towers' tokens, so they have one width; got "
                f"{self.vision.width} and {self.text.width}."
            )
        if self.segments < 2 or not self.temperature > 0:
            raise UsageError(
                "There are two or more segments to sort and a positive temperature, got "
                f"{self.segments} and {self.temperature}."
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Config:
        parts = {
            "vision": build_config(VitConfig, data["vision"]),
            "text": HfTextConfig.from_json(data["text"]),
        }
        return cast(Config, build_config(cls, {**data, **parts}))


def small() -> Config:
    """To train on one computer: a ViT with a convolutional stem for 64 pixels, a BERT for built-in words."""
    vision = VitConfig(64, 8, width=128, layers=4, heads=4, stem=((32, 0),))
    text = replace(distilbert(), vocab_size=8192, width=128, layers=3, heads=4, hidden=512, positions=77)
    return Config(vision, replace(text, context_length=77), embed_dim=128, sort_heads=4)


class SortHead(nn.Module):
    """tokens_BLD of a clip and features_BSD of its transcripts -> logits_BSS: row s says where s belongs.

    Transcripts have no positions, so the rows are permuted as they are.
    """

    def __init__(self, width: int, layers: int, heads: int, segments: int) -> None:
        super().__init__()
        self.type_embed = nn.Parameter(torch.zeros(1, 2, width))
        self.transformer = Transformer(width, layers, heads, 4.0, "gelu", causal=False, block=PlainBlock)
        self.ln_post = nn.LayerNorm(width, eps=EPSILON)
        self.head = nn.Linear(width, segments)

    def forward(self, tokens_BLD: Tensor, features_BSD: Tensor) -> Tensor:
        segments, given = self.head.out_features, tuple(features_BSD.shape)
        if len(given) != 3 or given[0] != len(tokens_BLD) or given[1] != segments:
            raise UsageError(
                f"The head sorts {segments} transcripts of each of {len(tokens_BLD)} clips, "
                f"({len(tokens_BLD)}, {segments}, D); got {given}."
            )
        clip_D, text_D = self.type_embed[0]
        x_BLD, _ = self.transformer(torch.cat([tokens_BLD + clip_D, features_BSD + text_D], dim=1))
        return cast(Tensor, self.head(self.ln_post(x_BLD[:, -segments:])))


class Tvts(JointTowers):
    """Videos of up to `frames` frames, pictures and texts in one space. Implements `moviola.types.Encoder`.

    `pred_model`, the sorting head, is for training alone.
    """

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config, TubeletViT(config.vision, config.frames, config.tubelet))
        self.pred_model = SortHead(
            config.vision.width, config.sort_layers, config.sort_heads, config.segments
        )

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> Tvts:
        """Untrained, from the JSON form of its configuration."""
        return cls(Config.from_json(data))

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], config: Config | None = None) -> Tvts:
        """The authors' checkpoint; without `config` sizes follow from the shapes, heads are 64 wide."""
        state = strip_prefix(dict(state), "module.")
        made = cls(config or _config_of(state))
        assign(made, KEYS.from_official(state), source="TVTS checkpoint")
        return made.eval()

    @classmethod
    def from_towers(
        cls, image: Mapping[str, Tensor], text: Mapping[str, Tensor], config: Config | None = None
    ) -> Tvts:
        """What the paper's training starts from: the ViT of an image MAE by timm's names, and DistilBERT.

        The kernel of its patches is copied to every frame of a tubelet, as officially: a still clip then
        gives twice what the image ViT saw. Projections and head are new, positions in time zero.
        """
        made = cls(config or Config())
        taps = made.config.tubelet
        image = {
            name: weight[:, :, None].expand(-1, -1, taps, -1, -1) if weight.ndim == 4 else weight
            for name, weight in image.items()
        }
        made.start_towers(image, text, KEYS, ("txt_proj", "vid_proj", "temporal_embedding", "pred_model"))
        return made.eval()

    @property
    def frame_spec(self) -> FrameSpec:
        return FrameSpec(self.config.frames, "middle", "repeat-last")

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """A picture is one tube of equal frames."""
        frames_BTCHW = pixels_BCHW.unsqueeze(1).expand(-1, self.config.tubelet, -1, -1, -1)
        return cast(Tensor, self.vid_proj(self.video_model.vector(frames_BTCHW)))

    def encode_video(self, batch: ClipBatch) -> Tensor:
        """The projected class token, with every patch: video_BD, not normalised."""
        return cast(Tensor, self.vid_proj(self.video_model.vector(batch.frames_BTCHW)))


_RULES = ("video_model.", "pred_model.")
KEYS = TimmKeys(
    *(rule for prefix in _RULES for rule in timm_rules(prefix)),
    Rule("video_model.temporal_embedding", "video_model.temporal_embed"),
    Rule("pred_model.type_embed", "pred_model.type_embed"),
    Rule("pred_model.head.{rest}", "pred_model.head.{rest}"),
    Rule("text_model.transformer.{rest}", "text_model.{rest}"),
    Rule("txt_proj.{rest}", "txt_proj.{rest}"),
    Rule("vid_proj.{rest}", "vid_proj.{rest}"),
    ignore=("text_model.embeddings.position_ids",),
)
"""Without the `module.` that published files begin every name with."""


def _config_of(state: Mapping[str, Tensor]) -> Config:
    shapes = Shapes(state)
    vision, text = shapes.timm_vit("video_model."), distilbert_of(shapes, "text_model.")
    tubelet = shapes("video_model.patch_embed.proj.weight")[2]
    segments, width = shapes("pred_model.head.weight")
    return Config(
        vision,
        replace(text, context_length=min(_TEXT_TOKENS, text.positions)),
        frames=shapes("video_model.temporal_embed")[1] * tubelet,
        tubelet=tubelet,
        embed_dim=shapes("vid_proj.0.weight")[0],
        segments=segments,
        sort_layers=shapes.count("pred_model.blocks.{n}.norm1.weight"),
        sort_heads=max(1, width // 64),
    )


def _start(module: nn.Module) -> nn.Module:
    if isinstance(module, Tvts):
        return module
    raise Refusal(
        f"TVTS cannot start from a {type(module).__name__}: its tower cuts tubelets and has no norm before "
        "the blocks, its text tower is a DistilBERT.",
        hint="Train a new one (--model tvts-small), or go on with a trained one (--init FOLDER).",
    )


TRAINING = Training(
    ScriptSorting,
    start=_start,
    presets={"tvts-b-16": Config, "tvts-small": small},
    recipe={"lr": 1e-4, "warmup": 0, "batch_size": 24, "betas": (0.9, 0.999), "eps": 1e-8},
)


def tiny() -> Config:
    text = replace(distilbert(), vocab_size=32, width=16, layers=1, heads=2, hidden=32, positions=8)
    text = replace(text, context_length=8, dropout=0.0)
    return Config(VitConfig(16, 8, width=16, layers=2, heads=2), text, frames=8, embed_dim=12, sort_heads=2)


def example(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Tvts(tiny()).eval()
        nn.init.normal_(model.video_model.temporal_embedding, std=0.2)
    objective = ScriptSorting(model).eval()

    def run(clip: ClipBatch, script_BSL: Tensor) -> dict[str, Tensor]:
        made = objective.outputs(model, {"clip": clip, "script": script_BSL})
        loss = torch.stack(list(objective.loss(model, made).values())).sum()
        scores_BB = model.score(made["text"], model.encode_video(clip))
        return {"video": made["video"], "text": made["text"], "scores": scores_BB, "loss": loss}

    mask_BT = torch.ones(5, 8, dtype=torch.bool)
    clip = ClipBatch(torch.randn(5, 8, 3, 16, 16, generator=generator), mask_BT.cumsum(1).float(), mask_BT)
    inputs = {"clip": clip, "script_BSL": torch.randint(1, 32, (5, 4, 8), generator=generator)}
    shapes = {"video": (5, 12), "text": (5, 12), "scores": (5, 5), "loss": ()}
    return Example(run, inputs, shapes, model, ("clip", "script_BSL", "video", "text"), "loss")


_ARMS = {"contrastive": (0.0, False), "shuffled frames": (2.0, True), "contrastive + sorting": (2.0, False)}
_CLIPS, _VIDEOS, _PIECE = 3000, 4000, 2  # a piece is two frames, so one tube


class _OnRows(ScriptSorting):
    """The objective on videos whose texts repeat by design."""

    def _warn_of_repeats(self, caption_N: Tensor) -> None:
        return


@lru_cache(maxsize=1)
def _videos(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces of two frames and what is said of each, and which four a video shows: piece_VS.

    The second half of the pieces are the first backwards. A video shows two actions of one thing, each
    forwards and backwards, in any order: all its frames and words come again in videos that differ from it
    in order alone.
    """
    clips = world.order_clips(seed, _CLIPS, frames=_PIECE)
    pixels_PTCSS = clips.pixels()
    label_P = np.concatenate([clips.label_N, clips.label_N ^ 1])
    text_PL = world.tokens([world.ACTIONS[label] for label in label_P.tolist()])
    rng, pair_P, thing_P = np.random.default_rng([seed, 5]), clips.label_N // 2, np.array(clips.things)
    piece_VS = np.empty((_VIDEOS, 4), np.int64)
    for video in range(_VIDEOS):
        first = rng.integers(_CLIPS)
        same_P = thing_P == thing_P[first]
        second = rng.choice(np.flatnonzero(same_P & (pair_P != pair_P[first])))
        piece_VS[video] = rng.permutation([first, first + _CLIPS, second, second + _CLIPS])
    return torch.cat([pixels_PTCSS, pixels_PTCSS.flip(1)]), text_PL, torch.from_numpy(piece_VS)


@lru_cache(maxsize=1)
def _begun(seed: int) -> Tvts:
    """What all arms begin with: a text tower that tells which words it has read, as one trained on text does.

    Positions in time are drawn, not zero: sorting then begins within a hundred steps, else not within 400.
    """
    words, length = world.vocabulary_size(), world.CONTEXT_LENGTH
    text = replace(
        tiny().text, vocab_size=words, width=64, hidden=128, positions=length, context_length=length
    )
    vision = VitConfig(world.SIDE, 16, width=64, layers=2, heads=2, stem=((8, 0),))
    torch.manual_seed(seed)
    model = Tvts(Config(vision, text, 4 * _PIECE, embed_dim=48, sort_heads=2))
    nn.init.normal_(model.video_model.temporal_embedding, std=0.5)
    told = nn.Linear(64, words)
    things = [f"{c} {s}" for c in world.SEEN["colours"]["train"] for s in world.SEEN["shapes"]["train"]]
    text_NL = world.tokens([*world.ACTIONS, *(f"a {t} {action}" for t in things for action in world.ACTIONS)])
    has_NV = torch.zeros(len(text_NL), words).scatter_(1, text_NL, 1.0)
    optimizer = torch.optim.AdamW([*model.text_model.parameters(), *told.parameters()], lr=3e-3)
    for _ in range(100):
        rows = torch.randint(len(text_NL), (64,))
        F.binary_cross_entropy_with_logits(told(model.text_model(text_NL[rows])), has_NV[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def run_claim(arm: str, seed: int, *, steps: int = 400) -> dict[str, float]:
    """Train one arm; probe its frozen tower for the actions, with test clips of new things and speeds."""
    sort_weight, shuffled = _ARMS[arm]
    pixels_PTCSS, text_PL, piece_VS = _videos(seed)

    def batch_of(rows: np.ndarray) -> Batch:
        frames_BTCSS = pixels_PTCSS[piece_VS[rows]].flatten(1, 2)
        if shuffled:
            order_BT = torch.rand(frames_BTCSS.shape[:2]).argsort(1)
            frames_BTCSS = frames_BTCSS[torch.arange(len(rows))[:, None], order_BT]
        return {"clip": world.clip_batch(frames_BTCSS), "script": text_PL[piece_VS[rows]]}

    with torch.random.fork_rng(devices=[]):
        model = copy.deepcopy(_begun(seed))
        torch.manual_seed(seed)
        objective = _OnRows(model, keep=1.0, sort_weight=sort_weight)
        fit_rows(model, objective, batch_of, _VIDEOS, steps=steps, batch=40, lr=2e-3, seed=seed)

    def vectors(clips: world.OrderClips, seed: int) -> np.ndarray:
        clips = clips.shuffled(seed) if shuffled else clips
        with torch.inference_mode():
            parts = [model.video_model.vector(part) for part in clips.pixels().split(200)]
        return F.normalize(torch.cat(parts), dim=-1).numpy()

    train = world.order_clips(seed + 1000, 1200, frames=_PIECE)
    test = world.order_clips(seed, 800, split="test", frames=_PIECE)
    classes_C1 = np.zeros((len(world.ACTIONS), 1))
    head = linear_probe(vectors(train, seed + 2), train.label_N, classes_C1, logit_scale=1.0, penalty=1e-4)
    logits_NC = head.logits(vectors(test, seed + 1))
    return {
        "pair accuracy": world.pair_accuracy(logits_NC, test.label_N),
        "actions, top-1": float((logits_NC.argmax(1) == test.label_N).mean() * 100),
    }


CLAIM = Claim(
    statement="Sorting what is said of a video's parts gives features that tell what runs which way.",
    data="videos of two order clips of 2 frames, each both ways; test clips of new things and speeds",
    metric="pair accuracy",
    arms=tuple(_ARMS),
    ours="contrastive + sorting",
    baseline="contrastive",
    run=run_claim,
    seeds=(3, 4, 5),  # 0 to 2 served to settle the claim
)
