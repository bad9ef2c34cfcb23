"""X-CLIP: frames pass each other messages in every block, and class texts are adjusted by the video.

An image tower becomes a video tower by one token. In every block each frame writes a message from its class
token, the messages of a video attend to each other, and each frame then attends to its own message beside
its patches; afterwards the message is dropped. A small transformer over frames (MIT) makes one vector of
them, and every class text attends to the video's patches before it is compared with that vector.

Ni, Peng, Chen, Zhang, Meng, Fu, Xiang, Ling: "Expanding Language-Image Pretrained Models for General Video
Recognition", ECCV 2022, arXiv 2208.02816. Official code: microsoft/VideoX, folder X-CLIP (MIT).

Symbols: the message token m_t is a row of `CrossFrameBlock.messages`, v the row 0 of `encode_video`, the
prompted text c + alpha * t what `VideoPrompts.cosines` compares; MIT and prompts are in `parts.clip_video`.

Known differences
- A clip of another number of frames is an error; the official code mixes frames of different videos when
  their number is a multiple of T, and fails in a `view` otherwise.
- Nothing is cached in the model. Officially (`use_cache`) the first call's class texts answer for ever, and
  every call puts the model back into training mode. The objective keeps the texts of its fixed classes.
- The official `build_model` calls `logger.info` on None without a logger, and leaves 4 MIT layers and
  alpha 0.1 as defaults where the class has 1 and 1e-4; here they are the released models': 1 and 0.1.
- The context is averaged over frames before it is projected, its keys and values are computed once a video,
  and a picture passes the tower once instead of T times: equal results.
- DropPath, 0 in all released configurations, is left out.
- The cosine of the schedule ends at 1/100 of every group's own rate, officially at 1/100 of the tower's.
- Equation numbers are not cited: this file was written from the official code, not from the paper.

Axis letters: B clips, T frames, F = B * T frames of all clips, L tokens of a frame (class token first),
D width, E embedding width, C classes, N texts, S side in pixels, R rows of an encoded video.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from moviola.clip.blocks import Attention, ResidualBlock
from moviola.clip.config import Activation, ClipConfig, TextConfig, VitConfig, vit_b_16, vit_b_32, vit_l_14
from moviola.clip.formats.common import scalar_logit_scale
from moviola.clip.formats.openai import infer_config
from moviola.clip.keys import Keys, Rule
from moviola.clip.model import CLIP
from moviola.clip.native import assign
from moviola.clip.weights import strip_prefix
from moviola.data import order_clips as world
from moviola.metrics.classification import topk_accuracy
from moviola.parts.clip_video import HEAD_KEYS, ClipVideo, ClipVideoConfig, head_sizes
from moviola.training.brief_rows import fit_rows
from moviola.training.recognition import Recognition
from moviola.types import Claim, ClipBatch, Example, Training

Config = ClipVideoConfig


def b_32() -> ClipVideoConfig:
    """The paper's ViT-B/32 with 8 frames."""
    return ClipVideoConfig.over(vit_b_32())


def b_16() -> ClipVideoConfig:
    return ClipVideoConfig.over(vit_b_16())


def l_14() -> ClipVideoConfig:
    return ClipVideoConfig.over(vit_l_14())


def l_14_336() -> ClipVideoConfig:
    """The largest one: 336 pixels and 16 frames."""
    return ClipVideoConfig.over(vit_l_14(336), frames=16)


class CrossFrameBlock(ResidualBlock):
    """CLIP's block in which a frame also attends to its message: x_FLD -> x_FLD.

    The frames of a clip lie together and in order; `frames` says how many they are. Nothing here knows the
    order: frames reordered give the outputs reordered.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        act: Activation,
        *,
        frames: int,
        causal: bool = False,
    ) -> None:
        super().__init__(width, heads, mlp_ratio, act, causal=causal)
        self.frames = frames
        self.message_fc = nn.Linear(width, width)
        self.message_ln = nn.LayerNorm(width)
        self.message_attn = Attention(width, heads)

    def messages(self, cls_BTD: Tensor) -> Tensor:
        """messages_BTD: one a frame, written from its class token, then shared among the frames of a clip."""
        message_BTD = self.message_fc(cls_BTD)
        return message_BTD + self.message_attn(self.message_ln(message_BTD))

    def forward(self, x_FLD: Tensor, frames: int | None = None) -> Tensor:
        message_BTD = self.messages(x_FLD[:, 0].unflatten(0, (-1, frames or self.frames)))
        seen_FLD = torch.cat([x_FLD, message_BTD.flatten(0, 1)[:, None]], dim=1)
        x_FLD = x_FLD + self.attn(self.ln_1(seen_FLD))[:, :-1]
        return x_FLD + self.mlp(self.ln_2(x_FLD))


class XClip(ClipVideo):
    """A CLIP for clips of T frames. Implements `moviola.types.Encoder`, not separable.

    `encode_video` gives (B, 1 + patches, E): the clip's vector, then the context for texts. Class texts are
    bare names.
    """

    def __init__(self, config: ClipVideoConfig) -> None:
        super().__init__(config, block=partial(CrossFrameBlock, frames=config.frames))

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> XClip:
        """Untrained, from the JSON form of its configuration."""
        return cls(ClipVideoConfig.from_json(data))

    @classmethod
    def from_clip(cls, clip: CLIP, **options: Any) -> XClip:
        """This CLIP with new messages, MIT and prompts, drawn at random: the start of the paper's training.

        `options` are fields of the configuration: `frames`, `mit_layers`, ... Messages are not zero at the
        start, so even frame vectors differ from CLIP's.
        """
        return cls(ClipVideoConfig.over(clip.config, **options)).start_from(clip)

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor]) -> XClip:
        """The authors' checkpoint. Sizes and frames follow from the shapes, heads are 64 wide."""
        ours = scalar_logit_scale(KEYS.from_official(strip_prefix(dict(state), "module.")))
        clip = infer_config(ours, source="The X-CLIP checkpoint")
        with torch.device("meta"):
            made = cls(ClipVideoConfig.over(clip, **head_sizes(ours)))
        assign(made, ours, source="X-CLIP checkpoint")
        return made.eval()

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """A picture as a clip of T equal frames: its vector_BE, not normalised.

        Equal messages share what each has alone, so one frame passes the tower for all of them: exact.
        """
        x_BLD = self.visual.embed(pixels_BCHW)
        for block in self.visual.transformer.resblocks:
            x_BLD = block(x_BLD, frames=1)
        frame_BE = self.visual.ln_post(x_BLD[:, 0]) @ self.visual.proj
        return cast(Tensor, self.mit(frame_BE[:, None].expand(-1, self.frames, -1)))


KEYS = HEAD_KEYS + Keys(Rule("{rest}", "{rest}"))
NEW = ("message_", "mit", "prompts")
"""What the names of the parameters that CLIP does not have begin with or hold."""


class XClipRecognition(Recognition):
    """The paper's training: the image tower at the run's rate, new parts at ten times it, the rest frozen.

    Options as in `Recognition`; the text tower and the logit scale never train.
    """

    def __init__(
        self, model: nn.Module, tokens_CL: Tensor, *, new_lr_scale: float = 10.0, **options: Any
    ) -> None:
        scales = dict.fromkeys(NEW, new_lr_scale)
        super().__init__(model, tokens_CL, train=("visual.", *NEW), lr_scales=scales, **options)


RECOGNITION = Training(
    XClipRecognition,
    start=lambda module: module if isinstance(module, XClip) else XClip.from_clip(cast(CLIP, module)),
    presets={"b-32": b_32, "b-16": b_16, "l-14": l_14, "l-14-336": l_14_336},
    recipe={
        "lr": 8e-6,
        "batch_size": 256,
        "epochs": 30,
        "betas": (0.9, 0.98),
        "eps": 1e-8,
        "lr_floor": 0.01,
    },
)


def tiny() -> ClipVideoConfig:
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2)
    clip = ClipConfig(16, vision, TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2))
    return ClipVideoConfig.over(clip, frames=3, mit_heads=2, prompt_heads=2)


def example(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    tokens_CL = torch.tensor([[30, n, n + 7, 31, 0, 0, 0, 0] for n in range(1, 6)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = XClip(tiny()).eval()
    objective = XClipRecognition(model, tokens_CL, mixup=0, cutmix=0)

    def run(frames_BTCHW: Tensor, label_B: Tensor) -> dict[str, Tensor]:
        mask_BT = torch.ones(frames_BTCHW.shape[:2], dtype=torch.bool)
        clip = ClipBatch(frames_BTCHW, torch.arange(3.0).expand(mask_BT.shape), mask_BT)
        video_BRE = model.encode_video(clip)
        return {
            "text": model.encode_text(tokens_CL),
            "video": video_BRE,
            "logits": model.score(model.encode_text(tokens_CL), video_BRE).T,
            "loss": objective(model, {"clip": clip, "label": label_B})["class"],
        }

    inputs = {
        "frames_BTCHW": torch.randn(4, 3, 3, 16, 16, generator=generator),
        "label_B": torch.randint(5, (4,), generator=generator),
    }
    shapes = {"text": (5, 16), "video": (4, 5, 16), "logits": (4, 5), "loss": ()}
    return Example(run, inputs, shapes, model, ("frames_BTCHW", "label_B", "video", "logits"), "loss")


# --------------------------------------------------------------------------------------------------
# The claim
# --------------------------------------------------------------------------------------------------

_FRAMES = 4


def _start(arm: str, clip: CLIP) -> CLIP:
    """What an arm trains. An MIT without blocks is the mean of the frames and a learned constant."""
    if arm == "frame mean":
        return clip
    config = ClipVideoConfig.over(clip.config, frames=_FRAMES, mit_layers=int(arm != "messages, no mit"))
    if arm == "mit, no messages":
        return ClipVideo(config, block=ResidualBlock).start_from(clip)
    return XClip(config).start_from(clip)


@lru_cache(maxsize=3)
def _clips(seed: int, count: int) -> tuple[world.OrderClips, world.OrderClips]:
    made = partial(world.order_clips, seed, frames=_FRAMES)
    return made(count), made(count // 4, split="test")


def _train(model: CLIP, objective: XClipRecognition, clips: world.OrderClips, steps: int, seed: int) -> None:
    fit_rows(
        model,
        objective,
        clips.labelled,
        len(clips),
        steps=steps,
        batch=24,
        lr=5e-4,
        seed=seed,
        clip_grad=math.inf,
    )


def run_claim(arm: str, seed: int, *, steps: int = 300, clips: int = 1600) -> dict[str, float]:
    """Train one arm to name eight actions; measure it on things and speeds that it has not met.

    The paper's recipe without mixing, new parts at twenty times the tower's rate since the steps are few.
    "Kind" is which pair of actions it is, told without order from several frames.
    """
    train, test = _clips(seed, clips)
    if arm == "shuffled frames":
        train, test = train.shuffled(seed), test.shuffled(seed + 1)
    tokens_CL = world.tokens(train.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _start(arm, copy.deepcopy(world.image_clip(seed)))
        before_CE = model.encode_text(tokens_CL).detach()
        objective = XClipRecognition(model, tokens_CL, new_lr_scale=20, mixup=0, cutmix=0)
        _train(model, objective, train, steps, seed)
    new = world.order_clips(seed, clips // 4, split="test", frames=_FRAMES, combined=True)
    new = new.shuffled(seed + 1) if arm == "shuffled frames" else new

    def scores(texts_CL: Tensor, seen: world.OrderClips) -> Tensor:
        text_CE, blocks = model.encode_text(texts_CL), torch.arange(len(seen)).split(50)
        return torch.cat([model.score(text_CE, model.encode_video(seen.batch(b))).T for b in blocks])

    with torch.inference_mode():
        moved = float((model.encode_text(tokens_CL) - before_CE).abs().max())
        scores_NC, new_NC = scores(tokens_CL, test), scores(world.tokens(world.COMBINED), new)
    kinds_NC = scores_NC.unflatten(1, (-1, 2)).logsumexp(-1)
    return {
        "pair accuracy": world.pair_accuracy(scores_NC, test.label_N),
        "action, top-1": topk_accuracy(scores_NC, test.label_N, (1,))["top1"],
        "kind of action, top-1": topk_accuracy(kinds_NC, test.label_N // 2, (1,))["top1"],
        "new classes, top-1": topk_accuracy(new_NC, new.label_N, (1,))["top1"],
        "text moved by": moved,
    }


CLAIM = Claim(
    statement="Frames that pass messages and are integrated by position tell actions that one frame cannot.",
    data="order clips: eight actions in pairs that are each other backwards, 4 frames; new things and speeds",
    metric="pair accuracy",
    arms=("frame mean", "shuffled frames", "messages, no mit", "mit, no messages", "x-clip"),
    ours="x-clip",
    baseline="frame mean",
    run=run_claim,
)
