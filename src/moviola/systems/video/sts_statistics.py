"""STS: a clip network learns to say where and how a clip moves most, and where its colours change most.

No clip is labelled by hand. Twenty-seven numbers are computed of each: in three ways to cut a frame into
blocks, the block with the strongest motion boundary and its direction, the blocks whose colours change most
and least, and what holds for the whole clip. A network that sees the pixels alone learns to give these
numbers; what it learned for that, one vector a clip, then serves to recognise actions and find like clips.

Wang, Jiao, Bao, He, Liu, Liu: "Self-supervised Video Representation Learning by Uncovering Spatio-temporal
Statistics", TPAMI 2021, arXiv 2008.13426. Official code: laura-wang/video_repres_sts (no licence found).

The labels are `data.clip_statistics`, and with flow, crops and mirroring `data.clip_labels`; the networks are
`parts.backbones.conv3d_nets`.

Known differences
- The colour of the second ring is counted in that ring. A missing comma in the official code counts part of
  the whole square instead; `official_strip` does so.
- A mirrored clip has the labels of its own flow, whose horizontal component changes sign. Officially it does
  not; `official_flip` leaves it.
- The flow is OpenCV's DIS, not TV-L1, not rounded to 8 bits, and of the clip's 16 frames there are 15 maps.
  Officially a sixteenth, towards the frame after the clip, is in the sums (but is no frame of its own).
- A colour is the octant of the most frequent single colour, as in the code in use, not that of most pixels.
- The network takes RGB clips from 0 to 255 and turns them to the BGR that the weights expect.
- S3D-G, the curriculum and the fine-tuning of the paper are not in the official code. The first two are left
  out, the recipe of `RECOGNITION` is ours.
- Equation numbers are not cited: this file was written from the official code, not from the paper.

Axis letters: B clips, T frames, F flow maps, C colours (or classes), H, W pixels, D width of the vector, N
queries, M videos.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from moviola.clip.config import build_config
from moviola.clip.keys import Keys, Rule
from moviola.clip.loaded import unit
from moviola.clip.native import assign
from moviola.clip.weights import strip_prefix
from moviola.data import placed_clips as world
from moviola.data.clip_labels import Labeller
from moviola.data.clip_statistics import APPEARANCE_NAMES, MOTION_NAMES, whole_pixels
from moviola.media.flow import Method
from moviola.parts.backbones.conv3d_nets import ConvNetConfig, conv_net, conv_net_config
from moviola.parts.linear_head import linear_probe
from moviola.parts.wordless_clips import WordlessClips
from moviola.training.brief_rows import fit_rows
from moviola.training.objectives import BaseObjective
from moviola.training.recognition import HeadRecognition
from moviola.types import (
    Batch,
    Claim,
    ClipBatch,
    Example,
    FrameSpec,
    Needs,
    Recipe,
    Refusal,
    Training,
    UsageError,
    VideoField,
)


@dataclass(frozen=True)
class Config:
    """C3D on 16 frames of 112 pixels. `classes`: those of a classifier of its own; 0: none."""

    net: ConvNetConfig = field(default_factory=ConvNetConfig)
    frames: int = 16
    image_size: int = 112
    classes: int = 0

    def __post_init__(self) -> None:
        frames, side = (8, 16) if self.net.kind == "c3d" else (2, 8)
        if self.frames < frames or self.image_size < side or self.classes < 0:
            raise UsageError(
                f"{self.net.kind} takes clips of {frames} frames or more and {side} pixels or more, and no "
                f"negative count of classes; got {self.frames}, {self.image_size} and {self.classes}."
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Config:
        return cast(Config, build_config(cls, {**data, "net": build_config(ConvNetConfig, data["net"])}))


def small() -> Config:
    """To train on one computer: R(2+1)D of a quarter of the width, on 64 pixels."""
    return Config(ConvNetConfig("r21d", widths=(16, 32, 64, 128)), image_size=64)


class STS(WordlessClips, nn.Module):
    """Clips as vectors, and the 27 statistics read off them. Implements `moviola.types.Encoder`.

    `score` is the cosine of vectors, so that one clip may be the query for others.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.frames, self.dim = config, config.frames, config.net.widths[-1]
        self.trunk = conv_net(config.net)
        self.motion_linear = nn.Linear(self.dim, len(MOTION_NAMES))
        self.app_linear = nn.Linear(self.dim, len(APPEARANCE_NAMES))
        self.classifier = nn.Linear(self.dim, config.classes) if config.classes else None

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> STS:
        """Untrained, from the JSON form of its configuration."""
        return cls(Config.from_json(data))

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor]) -> STS:
        """The authors' checkpoint of any of the three networks; which one follows from its names."""
        state = KEYS.from_official(strip_prefix(dict(state), "module."))
        net = conv_net_config({n.removeprefix("trunk."): t for n, t in state.items()})
        with torch.device("meta"):
            made = cls(Config(net))
        assign(made, state, source="STS checkpoint")
        return made.eval()

    @property
    def classes(self) -> int:  # type: ignore[override]
        return self.config.classes

    @property
    def frame_spec(self) -> FrameSpec:
        return FrameSpec(self.frames, "consecutive", "repeat-last")

    @property
    def recipe(self) -> Recipe:
        """Pixels from 0 to 255: scaled to 128 x 171 for 112 pixels, and the middle square cut out."""
        side = self.config.image_size
        scaled = (round(side * 128 / 112), round(side * 171 / 112))
        return Recipe(
            (side, side),
            resize="squash",
            resize_size=scaled,
            interpolation="bilinear",
            mean=(0.0, 0.0, 0.0),
            std=(1 / 255, 1 / 255, 1 / 255),
            sampler=self.frame_spec,
            features="sts_pooled",
            context_length=self.context_length,
        )

    def set_classes(self, count: int) -> None:
        """A new classifier of so many classes; the one there is where it has as many."""
        if count != self.config.classes:
            self.config = Config(self.config.net, self.frames, self.config.image_size, count)
            self.classifier = nn.Linear(self.dim, count).to(self.motion_linear.weight) if count else None

    def encode_frames(self, frames_BTCHW: Tensor) -> Tensor:
        """RGB clips from 0 to 255 -> vector_BD, not normalised."""
        bgr_BCTHW = frames_BTCHW.flip(2).transpose(1, 2)
        return cast(Tensor, self.trunk(bgr_BCTHW.contiguous(memory_format=torch.channels_last_3d)))

    def statistics(self, vector_BD: Tensor) -> tuple[Tensor, Tensor]:
        """What the network takes the clip's labels to be: motion (B, 14) and appearance (B, 13)."""
        return self.motion_linear(vector_BD), self.app_linear(vector_BD)

    def encode_video(self, batch: ClipBatch) -> Tensor:
        return self.encode_frames(self.frames_of(batch))

    def classify_video(self, batch: ClipBatch) -> Tensor:
        """logits_BC of the classifier."""
        if self.classifier is None:
            raise Refusal(
                "This STS has no classifier.",
                hint="Train one: moviola train --task recognition --data FOLDER.",
            )
        return cast(Tensor, self.classifier(self.encode_video(batch)))


KEYS = Keys(
    *(Rule(f"{head}.{{rest}}", f"{head}.{{rest}}") for head in ("motion_linear", "app_linear", "classifier")),
    Rule("trunk.{rest}", "{rest}"),
)
"""The authors' names; `classifier` is ours."""


class Statistics(BaseObjective):
    """Regress the 27 labels, as raw numbers, from a clip's pixels: losses `motion` and `appearance`.

    motion, appearance  weights of the two mean squared errors
    crop                side of the square cut out of each clip at random; None: the model's
    stages, decay       the run has equal stages, each with `decay` times the rate of the one before
    flow, flip, cache, official_*: see `data.clip_labels.Labeller`, which makes the labels.

    Biases learn at twice the rate.
    """

    needs: Needs = Needs((VideoField(whole=True),))
    scope: Literal["pair", "token", "local"] = "local"

    def __init__(
        self,
        model: STS,
        *,
        motion: float = 1.0,
        appearance: float = 0.1,
        crop: int | None = None,
        flow: Method = "dis",
        flip: float = 0.5,
        cache: int = 0,
        stages: int = 3,
        decay: float = 0.1,
        weight_decay: float = 0.005,
        official_strip: bool = False,
        official_flip: bool = False,
    ) -> None:
        super().__init__()
        if stages < 1 or not 0 < decay <= 1 or weight_decay < 0:
            raise UsageError(
                f"stages is 1 or more, decay in (0, 1] and weight_decay not negative, got {stages}, {decay} "
                f"and {weight_decay}."
            )
        side = crop or model.config.image_size
        self.label = Labeller(side, flow, flip, cache, official_strip, official_flip)
        self.weights, self.stages, self.decay = (motion, appearance), stages, decay
        self.weight_decay = weight_decay

    def losses(self, model: STS, frames_BTCHW: Tensor, labels_B27: Tensor) -> dict[str, Tensor]:
        """Weighed mean squared errors of clips whose labels are there."""
        wanted = labels_B27.float().split((len(MOTION_NAMES), len(APPEARANCE_NAMES)), dim=1)
        made = model.statistics(model.encode_frames(frames_BTCHW))
        motion, appearance = (
            weight * F.mse_loss(got.float(), want) for weight, got, want in zip(self.weights, made, wanted)
        )
        return {"motion": motion, "appearance": appearance}

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        model = cast(STS, model)
        frames_BTCHW = model.frames_of(batch["clip"])
        rgb_BTHWC = whole_pixels(frames_BTCHW.permute(0, 1, 3, 4, 2).cpu().numpy())
        rgb, labels_B27 = self.label(rgb_BTHWC, [int(row) for row in batch.get("row", ())])
        seen_BTCHW = torch.from_numpy(rgb).to(frames_BTCHW).permute(0, 1, 4, 2, 3)
        return self.losses(model, seen_BTCHW, torch.from_numpy(labels_B27).to(frames_BTCHW.device))

    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        """Weights, and biases at twice the rate; both decay. A classifier is left alone."""
        named = [(n, p) for n, p in model.named_parameters() if not n.startswith("classifier")]
        for ending, scale in (("weight", 1.0), ("bias", 2.0)):
            parameters = [p for n, p in named if n.endswith(ending)]
            yield {"params": parameters, "weight_decay": self.weight_decay, "lr_scale": scale}

    def lr_factors(self, step: int, steps: int) -> Sequence[float]:
        return [self.decay ** (step * self.stages // steps)] * 2


def _start(module: nn.Module) -> nn.Module:
    if isinstance(module, STS):
        return module
    raise Refusal(
        f"STS trains a network of clips, not a {type(module).__name__}.",
        hint="Take a new one: --model sts-small, or go on with a trained one: --init FOLDER.",
    )


_PRESETS = {
    "sts-c3d": Config,
    "sts-r3d": lambda: Config(ConvNetConfig("r3d")),
    "sts-r21d": lambda: Config(ConvNetConfig("r21d")),
    "sts-small": small,
}
_SGD = {"optimizer": "sgd", "momentum": 0.9, "warmup": 0, "clip_grad": 1e9}  # officially not clipped
TRAINING = Training(Statistics, _start, presets=_PRESETS, recipe={**_SGD, "lr": 5e-4, "batch_size": 30})
RECOGNITION = Training(
    HeadRecognition, _start, presets=_PRESETS, recipe={**_SGD, "lr": 1e-2, "batch_size": 30, "epochs": 18}
)


def example(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = STS(Config(ConvNetConfig("r21d", (4, 4, 6, 8)), frames=4, image_size=16)).eval()
    objective = Statistics(model)

    def run(clip: ClipBatch, labels_B27: Tensor) -> dict[str, Tensor]:
        video_BD = model.encode_video(clip)
        motion_B14, appearance_B13 = model.statistics(video_BD)
        loss = sum(objective.losses(model, clip.frames_BTCHW, labels_B27).values(), torch.zeros(()))
        return {"video": video_BD, "motion": motion_B14, "appearance": appearance_B13, "loss": loss}

    frames_BTCHW = torch.randint(256, (5, 4, 3, 16, 16), generator=generator).float()
    mask_BT = torch.ones(5, 4, dtype=torch.bool)
    labels_B27 = torch.randint(1, 9, (5, 27), generator=generator)
    inputs = {"clip": ClipBatch(frames_BTCHW, mask_BT.cumsum(1).float(), mask_BT), "labels_B27": labels_B27}
    shapes = {"video": (5, 8), "motion": (5, 14), "appearance": (5, 13), "loss": ()}
    return Example(
        run, inputs, shapes, model, ("clip", "labels_B27", "video", "motion", "appearance"), "loss"
    )


class _OnRows(Statistics):
    """The objective on clips whose labels are there already."""

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.losses(cast(STS, model), batch["frames"], batch["labels"])


def _pretrain(model: STS, clips: world.PlacedClips, steps: int, seed: int) -> None:
    objective, frames_NTCSS = _OnRows(model, flip=0.0), clips.pixels()
    labels_N27 = torch.from_numpy(objective.label(clips.frames_NTSSC)[1])
    motion_14, appearance_13 = labels_N27.float().mean(0).split((14, 13))
    with torch.no_grad():  # Adam would take longer than the run to find the means alone
        model.motion_linear.bias.copy_(motion_14)
        model.app_linear.bias.copy_(appearance_13)

    def batch(rows: np.ndarray) -> Batch:
        return {"frames": frames_NTCSS[rows], "labels": labels_N27[rows]}

    fit_rows(model, objective, batch, len(clips), steps=steps, batch=24, lr=3e-3, seed=seed)


def run_claim(
    arm: str, seed: int, *, steps: int = 150, clips: tuple[int, int] = (640, 320)
) -> dict[str, float]:
    """Train one arm without actions; tell actions from its frozen vectors, for things and speeds not met."""
    train, test = (
        world.placed_clips(seed, n, split=s) for n, s in zip(clips, ("train", "test"), strict=True)
    )
    net = ConvNetConfig("r3d", widths=(8, 16, 32, 64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = STS(Config(net, frames=world.FRAMES, image_size=world.SIDE))
        if arm != "random weights":
            _pretrain(model, train.shuffled(seed) if "shuffled" in arm else train, steps, seed)
    # in every arm the norms know the ordered training clips
    update_bn((part.flip(2).transpose(1, 2) for part in train.pixels().split(64)), model.trunk)
    model.eval()
    with torch.inference_mode():
        train_ND, test_MD = (
            unit(torch.cat([model.encode_frames(part) for part in c.pixels().split(64)]).numpy())
            for c in (train, test)
        )
    head = linear_probe(train_ND, train.label_N, np.eye(len(world.ACTIONS)), logit_scale=1.0, penalty=1e-3)
    told_M = head.logits(test_MD).argmax(axis=1)
    found_M = train.label_N[(test_MD @ train_ND.T).argmax(axis=1)]
    right = {
        "linear probe, top-1": told_M == test.label_N,
        "retrieval, top-1": found_M == test.label_N,
        "probe, place": told_M // 4 == test.label_N // 4,
        "probe, way": told_M % 4 == test.label_N % 4,
    }
    return {name: float(right_M.mean() * 100) for name, right_M in right.items()}


CLAIM = Claim(
    statement="Vectors learned from statistics of motion and colour tell actions, random weights' do not.",
    data="clips of four things of which one moves: 4 places x 4 ways; new things and speeds in the test",
    metric="linear probe, top-1",
    arms=("random weights", "statistics of shuffled frames", "statistics"),
    ours="statistics",
    baseline="random weights",
    run=run_claim,
    seeds=(3, 4, 5),  # 0 to 2 served to settle the claim
)
