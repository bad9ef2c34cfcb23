"""ILA: neighbouring frames are aligned by a point in each, and a frozen CLIP looks at the aligned frames.

No attention runs over time in the image tower. Before the spatial attention of every block, convolutions look
at each pair of neighbouring frames and name a point in either one; a soft mask around the points keeps what
the two share (a cosine loss pulls it together), and what the convolutions saw of the pair is kept too. Both
are added to the tokens by maps that start at zero, so that the block begins as CLIP's. Frames become one
vector by an MIT, and class texts look at the video, as in X-CLIP (`parts.clip_video`).

Tu, Dai, Wu, Cheng, Hu, Jiang: "Implicit Temporal Modeling with Learnable Alignment for Video Recognition",
ICCV 2023, arXiv 2304.10465. Official code: Francis-Rings/ILA (no licence file; nothing copied).

Symbols: a is `AlignedBlock.written`, W1 `temporal_skip_align_fc`, W2 `temporal_skip_fc`; the alignment itself
is in `parts.alignment`.

Known differences
- The abstract pools the aligned features into one more token for spatial attention. The released code has no
  such token, it adds the masked maps and the interaction to all tokens: so does this.
- Prompts never train: the authors' optimiser does not hold them (nor does `IlaRecognition` by default), so a
  released model's are the random ones it began with. `train_prompts=True` trains them at the MIT's rate.
- The classifier of their Something-Something models, a linear head without texts, is not built. The
  convolution of those models is: `interactive="full"`.
- Nothing is cached in the model, and a clip of another length is an error, as for X-CLIP.
- Whether points are jittered is `module.training`, officially an attribute of its own that is true at first.
  The distance is halved at the start of epoch 30 and of each later one of 50; here epochs are fiftieths of
  the run, whatever its length, and a resumed run goes on where it was (officially at the full distance).
- One weight a token makes the aligned frames: both masks of an inner frame act on the same map. The nine
  jittered points are the product of three an axis. `fc` and W2 meet no nonlinearity between them, so their
  product is taken first. Equal results, and tested.
- DropPath is left out, and the schedule's floor is as in `x_clip`.
- Equation numbers are not cited: this file was written from the official code, not from the paper.

Axis letters: B clips, T frames, t = T - 1 pairs of neighbours, F = B * T, L tokens (class token first),
P patches, D width, E embedding width, R rows of an encoded video, N test clips, H height and W width in
pixels; C classes (in frames_BTCHW channels, in seen_BTPC half the channels of the convolutions).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.blocks import ResidualBlock
from moviola.clip.config import Activation, ClipConfig, TextConfig, VitConfig, vit_b_16, vit_b_32, vit_l_14
from moviola.clip.formats.common import scalar_logit_scale
from moviola.clip.formats.openai import infer_config
from moviola.clip.keys import Keys, Rule
from moviola.clip.model import CLIP
from moviola.clip.native import assign
from moviola.clip.weights import strip_prefix
from moviola.data import order_clips as world
from moviola.metrics.classification import topk_accuracy
from moviola.parts.alignment import Alignment, AlignmentConfig, ImplicitAlignment, misalignment, over_frames
from moviola.parts.clip_video import HEAD_KEYS, ClipVideo, ClipVideoConfig, head_sizes
from moviola.training.brief_rows import fit_rows
from moviola.training.objectives import decay_groups
from moviola.training.recognition import Recognition
from moviola.types import CheckpointError, Claim, ClipBatch, Example, Training


@dataclass(frozen=True)
class IlaConfig(AlignmentConfig, ClipVideoConfig):
    """A CLIP, the frames of a clip, the alignment of its blocks and the parts on top."""


Config = IlaConfig


def b_32() -> IlaConfig:
    """The paper's ViT-B/32 with 8 frames."""
    return IlaConfig.over(vit_b_32())


def b_16() -> IlaConfig:
    return IlaConfig.over(vit_b_16())


def l_14_336() -> IlaConfig:
    """The largest one: 336 pixels and 16 frames."""
    return IlaConfig.over(vit_l_14(336), frames=16)


class AlignedBlock(ResidualBlock):
    """CLIP's block after an alignment: x_FLD -> x_FLD, the frames of a clip together and in order."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        act: Activation,
        *,
        config: IlaConfig,
        causal: bool = False,
    ) -> None:
        super().__init__(width, heads, mlp_ratio, act, causal=causal)
        self.frames = config.frames
        self.message_fc = nn.Linear(width, width)
        self.message_ln = nn.LayerNorm(width)
        grid = cast(VitConfig, config.vision).grid
        self.message_attn = ImplicitAlignment(width, grid, config.frames, config)
        self.temporal_skip_fc = nn.Linear(width, width)
        self.temporal_skip_align_fc = nn.Linear(width, width)
        for skip in (self.temporal_skip_fc, self.temporal_skip_align_fc):
            nn.init.zeros_(skip.weight)
            nn.init.zeros_(skip.bias)

    def written(self, x_FLD: Tensor) -> Tensor:
        """a_BTLD: the tokens as they are aligned."""
        return cast(Tensor, self.message_ln(self.message_fc(x_FLD))).unflatten(0, (-1, self.frames))

    def aligned(self, a_BTLD: Tensor, found: Alignment) -> Tensor:
        """The frames under their masks, class tokens whole: aligned_BTLD."""
        weight_BTL = F.pad(over_frames(found.earlier_BtP, found.later_BtP), (1, 0), value=1.0)
        return weight_BTL[..., None].to(a_BTLD.dtype) * a_BTLD

    def interaction(self, a_BTLD: Tensor, found: Alignment) -> Tensor:
        """W2 of the class tokens and of `fc` of what was seen: (B, T, L, D)."""
        skip, fc = self.temporal_skip_fc, self.message_attn.fc
        bias_D = F.linear(fc.bias, skip.weight, skip.bias)
        patches_BTPD = F.linear(found.seen_BTPC, skip.weight @ fc.weight, bias_D)
        return torch.cat([skip(a_BTLD[:, :, :1]), patches_BTPD], dim=2)

    def forward(self, x_FLD: Tensor) -> Tensor:
        a_BTLD = self.written(x_FLD)
        found = self.message_attn(a_BTLD)
        aligned_BTLD = self.temporal_skip_align_fc(self.aligned(a_BTLD, found))
        return super().forward(x_FLD + (aligned_BTLD + self.interaction(a_BTLD, found)).flatten(0, 1))


class Ila(ClipVideo):
    """A CLIP for clips of T frames. Implements `moviola.types.Encoder`, not separable.

    `encode_video` gives (B, 1 + patches, E): the clip's vector, then the context for texts. Class texts are
    bare names.
    """

    config: IlaConfig

    def __init__(self, config: IlaConfig) -> None:
        super().__init__(config, block=partial(AlignedBlock, config=config))

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> Ila:
        """Untrained, from the JSON form of its configuration."""
        return cls(IlaConfig.from_json(data))

    @classmethod
    def from_clip(cls, clip: CLIP, **options: Any) -> Ila:
        """This CLIP with new alignment, MIT and prompts; frame vectors are exactly CLIP's at first.

        `options` are fields of the configuration: `frames`, `interactive`, `channels`, ...
        """
        return cls(IlaConfig.over(clip.config, **options)).start_from(clip)

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor]) -> Ila:
        """The authors' Kinetics checkpoint. Sizes, frames and the kind of convolution follow from shapes."""
        ours = scalar_logit_scale(KEYS.from_official(strip_prefix(dict(state), "module.")))
        aligner = "visual.transformer.resblocks.0.message_attn."
        if "prompts_generator.alpha" not in ours or f"{aligner}conv.weight" not in ours:
            raise CheckpointError(
                "The checkpoint has no prompts_generator.alpha or no alignment, expected an ILA with texts.",
                hint="The Something-Something models have a linear head and no texts; they cannot be read.",
            )
        kind = "full" if f"{aligner}interactive_block.0.weight" in ours else "separable"
        sizes = {"interactive": kind, "channels": 2 * len(ours[f"{aligner}conv.weight"]), **head_sizes(ours)}
        with torch.device("meta"):
            made = cls(IlaConfig.over(infer_config(ours, source="The ILA checkpoint"), **sizes))
        assign(made, ours, source="ILA checkpoint")
        return made.eval()

    def train(self, mode: bool = True) -> Self:
        """A convolutional stem is part of the frozen CLIP, so its BatchNorm stays as it was learned."""
        super().train(mode)
        self.visual.stem.eval()
        return self

    def set_jitter(self, distance: float) -> None:
        for block in self.visual.transformer.resblocks:
            cast(AlignedBlock, block).message_attn.jitter = distance

    @contextmanager
    def misalignments(self) -> Iterator[list[Tensor]]:
        """A list that gets each block's `misalignment` while clips are encoded in the `with` statement."""
        found: list[Tensor] = []
        hooks = [
            cast(AlignedBlock, block).message_attn.register_forward_hook(
                lambda _, given, out: found.append(misalignment(given[0], out))
            )
            for block in self.visual.transformer.resblocks
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


KEYS = HEAD_KEYS + Keys(Rule("{rest}", "{rest}"))

GROUPS = {"message_": (62.5, 1.0), "temporal_": (10.0, 0.1), "mit.": (50.0, 0.3)}
"""What trains: the rate by the run's, and the decay by `weight_decay`. The rest of the model is frozen."""


class IlaRecognition(Recognition):
    """The paper's training: cross-entropy and, `alignment_weight` times, the misalignment of all blocks.

    From the `steady`-th of `epochs` parts of the run on, the jitter is halved in every part. The other
    options are those of `Recognition`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens_CL: Tensor,
        *,
        alignment_weight: float = 1.0,
        train_prompts: bool = False,
        epochs: int = 50,
        steady: int = 30,
        weight_decay: float = 0.01,
        **options: Any,
    ) -> None:
        self.groups = GROUPS | ({"prompts_": GROUPS["mit."]} if train_prompts else {})
        self.alignment_weight, self.epochs, self.steady = alignment_weight, epochs, steady
        scales = {word: scale for word, (scale, _) in self.groups.items()}
        super().__init__(
            model, tokens_CL, train=tuple(scales), lr_scales=scales, weight_decay=weight_decay, **options
        )
        self.jitter = cast(Ila, model).config.jitter
        self.register_buffer("halvings", torch.zeros((), dtype=torch.int64))

    def losses(self, model: Any, clip: ClipBatch, target_BC: Tensor) -> dict[str, Tensor]:
        model.set_jitter(self.jitter * 0.5 ** int(self.get_buffer("halvings")))
        with model.misalignments() as found:
            losses = super().losses(model, clip, target_BC)
        return losses | {"alignment": self.alignment_weight * torch.stack(found).sum()}

    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        for word, (scale, decay) in self.groups.items():
            named = {n.replace(".", "/"): p for n, p in model.named_parameters() if word in n}
            for group in decay_groups(nn.ParameterDict(named), decay * self.weight_decay):
                yield {**group, "lr_scale": scale}

    def lr_factors(self, step: int, steps: int) -> None:
        """The loop's own schedule; what is noted here is how far the jitter has shrunk at the next step."""
        epoch = min(step + 1, steps - 1) * self.epochs // steps
        self.get_buffer("halvings").fill_(max(0, epoch - self.steady + 1))


RECOGNITION = Training(
    IlaRecognition,
    start=lambda module: module if isinstance(module, Ila) else Ila.from_clip(cast(CLIP, module)),
    presets={"b-32": b_32, "b-16": b_16, "l-14-336": l_14_336},
    recipe={
        "lr": 8e-6,
        "batch_size": 256,
        "epochs": 50,
        "betas": (0.9, 0.98),
        "eps": 1e-8,
        "lr_floor": 0.01,
    },
)


def tiny() -> IlaConfig:
    vision = VitConfig(image_size=16, patch_size=4, width=16, layers=2, heads=2)
    clip = ClipConfig(16, vision, TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2))
    return IlaConfig.over(clip, frames=3, mit_heads=2, prompt_heads=2, channels=16)


def example(seed: int) -> Example:
    """With the maps that start at zero drawn, so that the alignment counts."""
    generator = torch.Generator().manual_seed(seed)
    tokens_CL = torch.tensor([[30, n, n + 7, 31, 0, 0, 0, 0] for n in range(1, 6)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Ila(tiny()).eval()
        for parameter in model.visual.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    objective = IlaRecognition(model, tokens_CL, mixup=0, cutmix=0)

    def run(frames_BTCHW: Tensor, label_B: Tensor) -> dict[str, Tensor]:
        clip = world.clip_batch(frames_BTCHW)
        video_BRE = model.encode_video(clip)
        return {
            "text": model.encode_text(tokens_CL),
            "video": video_BRE,
            "logits": model.score(model.encode_text(tokens_CL), video_BRE).T,
            "loss": torch.stack(list(objective(model, {"clip": clip, "label": label_B}).values())).sum(),
        }

    inputs = {
        "frames_BTCHW": torch.randn(4, 3, 3, 16, 16, generator=generator),
        "label_B": torch.randint(5, (4,), generator=generator),
    }
    shapes = {"text": (5, 16), "video": (4, 17, 16), "logits": (4, 5), "loss": ()}
    return Example(run, inputs, shapes, model, ("frames_BTCHW", "label_B", "video", "logits"), "loss")


# --------------------------------------------------------------------------------------------------
# The claim
# --------------------------------------------------------------------------------------------------

_FRAMES = 4


def _start(arm: str, clip: CLIP) -> CLIP:
    """What an arm trains; the convolutions are narrower than the paper's."""
    if arm == "frame mean":
        return clip
    config = IlaConfig.over(clip.config, frames=_FRAMES, channels=32)
    if arm == "mit alone":
        return ClipVideo(config, block=ResidualBlock).start_from(clip)
    return Ila(config).start_from(clip)


def _objective(arm: str, model: CLIP, tokens_CL: Tensor) -> Recognition:
    """The tower is frozen but where frames are averaged, which leaves nothing else to train."""
    plain: dict[str, Any] = {"mixup": 0, "cutmix": 0}
    if isinstance(model, Ila):
        return IlaRecognition(model, tokens_CL, alignment_weight=float(arm != "no alignment loss"), **plain)
    scales = {"visual.": 5.0} if arm == "frame mean" else {"mit.": GROUPS["mit."][0]}
    return Recognition(model, tokens_CL, train=tuple(scales), lr_scales=scales, **plain)


@lru_cache(maxsize=3)
def _clips(seed: int, count: int) -> tuple[world.OrderClips, world.OrderClips]:
    made = partial(world.order_clips, seed, frames=_FRAMES)
    return made(count), made(count // 2, split="test")


def _train(model: CLIP, objective: Recognition, clips: world.OrderClips, steps: int, seed: int) -> None:
    fit_rows(
        model,
        objective,
        clips.labelled,
        len(clips),
        steps=steps,
        batch=24,
        lr=1e-4,
        seed=seed,
        clip_grad=math.inf,
    )


def run_claim(arm: str, seed: int, *, steps: int = 120, clips: int = 1000) -> dict[str, float]:
    """Train one arm to name eight actions; measure it on things and speeds that it has not met.

    The paper's recipe without mixing, at 12 times its rates since the steps are few.
    """
    train, test = _clips(seed, clips)
    if arm == "shuffled frames":
        train, test = train.shuffled(seed), test.shuffled(seed + 1)
    tokens_CL = world.tokens(train.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _start(arm, copy.deepcopy(world.image_clip(seed)))
        _train(model, _objective(arm, model, tokens_CL), train, steps, seed)
    with torch.inference_mode():
        text_CE = model.encode_text(tokens_CL)
        blocks = torch.arange(len(test)).split(50)
        scores_NC = torch.cat([model.score(text_CE, model.encode_video(test.batch(b))).T for b in blocks])
    return {
        "pair accuracy": world.pair_accuracy(scores_NC, test.label_N),
        "action, top-1": topk_accuracy(scores_NC, test.label_N, (1,))["top1"],
    }


CLAIM = Claim(
    statement="Neighbouring frames, aligned, tell actions that one frame cannot; the image model is frozen.",
    data="order clips: eight actions in pairs that are each other backwards, 4 frames; new things and speeds",
    metric="pair accuracy",
    arms=("frame mean", "shuffled frames", "mit alone", "no alignment loss", "ila"),
    ours="ila",
    baseline="frame mean",
    run=run_claim,
)
