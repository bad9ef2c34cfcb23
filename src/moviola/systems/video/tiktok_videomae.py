"""VideoMAE V2 as trained on TikTokActions: a video transformer that learns from clips without any labels.

Nine of ten tubelets of a clip are hidden, the same places in all frames, and the encoder sees the rest
alone. A shallow decoder then says the pixels of half of all tubelets, chosen so that every 2 x 2 cell keeps
two of its places and the choice runs on from layer to layer. Only tubelets that were hidden count. What is
pre-trained so is fine-tuned to name actions, from the mean of all tokens.

Qian et al.: "Advancing Human Action Recognition with Foundation Models trained on Unlabeled Public Videos",
arXiv 2402.08875; its model is that of Wang et al.: "VideoMAE V2: Scaling Video Masked Autoencoders with Dual
Masking", CVPR 2023, arXiv 2303.16727. Official code of the latter: OpenGVLab/VideoMAEv2 (MIT).

Parts: the towers are `parts.backbones.video_mae`, the masks `parts.video_masks`, and the cleaning of raw
clips before training is `moviola.verbs.clean_clips`.

Known differences
- The training code and hashtags of TikTokActions are not public; its recipe is taken to be VideoMAE V2's.
- Tubelets that are hidden, or not reconstructed, are never computed, not even as patches or targets. Exact.
- The loss is pooled over the batch, over all its parts and processes; officially over each process's rows.
- The crops of a clip that is read once are cut out of the loaded frames, anywhere, not at thirteen places.
- Of a clip with too few frames the last one repeats, with a warning; officially drawn ones do.
- Only fixed positions are read, as in all published models, and a fine-tuned model has a mean over tokens.
- Equation numbers are not cited: this file was written from the official code, not from the paper.

Axis letters: B clips (each `samples` times), T frames, C classes or channels, P pixels of a side, N tokens
of a clip, V of them visible, K reconstructed, D encoder's width, E decoder's, X numbers of a tubelet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.config import build_config
from moviola.clip.keys import Keys, Rule
from moviola.clip.native import assign
from moviola.clip.weights import strip_prefix
from moviola.data import order_clips as world
from moviola.parts.backbones.video_mae import MaskedAutoencoder, StackConfig, pixel_targets, stack_of
from moviola.parts.clip_crops import scaled_crops
from moviola.parts.timm_vit import EPSILON, Shapes
from moviola.parts.video_masks import Grid, kept, running_cell_mask, take, tube_mask
from moviola.parts.wordless_clips import WordlessClips
from moviola.training.few_labels import SIDE, few_label_accuracy, fit_clips, unlabelled
from moviola.training.layer_decay import LayerDecay
from moviola.training.objectives import BasePairObjective
from moviola.types import (
    Batch,
    CheckpointError,
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

Sampler = Literal["consecutive", "middle"]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Config:
    """ViT-B for 16 frames, four apart, of 224 pixels, and a decoder of four blocks.

    decoder   None: the model is not (or no longer) there to be pre-trained
    sampler   `consecutive` frames `stride` apart from the middle of a clip; or the `middle` of equal parts
    classes   of the classifier; 0: none. `head_scale` shrinks its first weights
    """

    encoder: StackConfig = field(default_factory=StackConfig)
    decoder: StackConfig | None = field(default_factory=lambda: StackConfig(384, 4, 6))
    image_size: int = 224
    patch: int = 16
    frames: int = 16
    tubelet: int = 2
    stride: int = 4
    sampler: Sampler = "consecutive"
    classes: int = 0
    head_scale: float = 0.001

    def __post_init__(self) -> None:
        if self.sampler not in get_args(Sampler):
            raise UsageError(f"Frames are {' or '.join(get_args(Sampler))}, got {self.sampler!r}.")
        if self.classes and self.decoder is not None:
            raise UsageError("A model with a classifier has no decoder: set decoder to None.")
        if self.stride < 1 or self.classes < 0:
            raise UsageError(
                f"A stride is at least 1, classes at least 0; got {self.stride}, {self.classes}."
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Config:
        names = {"encoder", "decoder"} & set(data)
        stacks = {name: data[name] and build_config(StackConfig, data[name]) for name in names}
        return cast(Config, build_config(cls, {**data, **stacks}))


def _vit(encoder: tuple[Any, ...], decoder: tuple[Any, ...], **more: Any) -> Config:
    return Config(StackConfig(*encoder), StackConfig(*decoder), **more)


PRESETS: dict[str, Callable[[], Config]] = {
    "vmae-s": partial(_vit, (384, 12, 6), (192, 4, 3)),
    "vmae-b": Config,
    "vmae-l": partial(_vit, (1024, 24, 16), (512, 4, 8)),
    "vmae-h": partial(_vit, (1280, 32, 16), (512, 4, 8)),
    "vmae-g": partial(_vit, (1408, 40, 16, 48 / 11), (512, 4, 8, 2234 / 512), patch=14),
    "vmae-small": partial(_vit, (192, 6, 6), (96, 2, 3), image_size=64, patch=8, frames=8, stride=2),
}
"""The published sizes, and `vmae-small`, which one computer can train."""


class VideoMae(WordlessClips, MaskedAutoencoder):
    """One vector a clip, without words; with classes, a classifier of clips. An `Encoder`.

    Without classes the vector is the mean of the normalised tokens, with them the normalised mean.
    """

    head_dropout = 0.0

    def __init__(self, config: Config) -> None:
        size = (config.frames, config.image_size, config.patch, config.tubelet)
        super().__init__(config.encoder, config.decoder, size)
        self.config, self.frames, self.dim = config, config.frames, config.encoder.width
        if config.classes:
            self._add_head()

    def _add_head(self) -> None:
        device = next(self.parameters()).device
        if not hasattr(self, "fc_norm"):
            self.encoder.norm = nn.Identity()
            self.fc_norm = nn.LayerNorm(self.dim, eps=EPSILON, device=device)
        self.head = nn.Linear(self.dim, self.config.classes, device=device)
        nn.init.normal_(self.head.weight, std=0.02 * self.config.head_scale)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> VideoMae:
        """Untrained, from the JSON form of its configuration."""
        return cls(Config.from_json(data))

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], config: Config | None = None) -> VideoMae:
        """The authors' pre-trained or fine-tuned checkpoint.

        Without `config` widths follow from the shapes; frames are 16, four apart, of 224 pixels.
        """
        state = strip_prefix(dict(state), "module.")
        tuned = "head.weight" in state
        with torch.device("meta"):
            made = cls(config or _config_of(state))
        assign(made, (TUNED_KEYS if tuned else KEYS).from_official(state), source="VideoMAE checkpoint")
        return made.eval()

    @property
    def classes(self) -> int:  # type: ignore[override]
        return self.config.classes

    @property
    def frame_spec(self) -> FrameSpec:
        return FrameSpec(self.frames, self.config.sampler, "mask", stride=self.config.stride)

    @property
    def recipe(self) -> Recipe:
        """The short side scaled, the centre kept, ImageNet's mean and standard deviation."""
        side = self.config.image_size
        return Recipe((side, side), interpolation="bilinear", mean=_MEAN, std=_STD, context_length=0)

    def encode_video(self, batch: ClipBatch) -> Tensor:
        """video_BD, not normalised to length one."""
        mean_BD = self.encoder(self.held_frames(batch)).mean(1)
        return cast(Tensor, self.fc_norm(mean_BD)) if self.config.classes else mean_BD

    def set_classes(self, count: int) -> None:
        """A new classifier of so many classes; the decoder and the norm of tokens go with the first one."""
        if count < 1:
            raise UsageError(f"A classifier has at least one class, got {count}.")
        if count == self.config.classes:
            return
        self.drop_decoder()
        self.config = replace(self.config, decoder=None, classes=count)
        self._add_head()

    def classify_video(self, batch: ClipBatch) -> Tensor:
        """logits_BC"""
        if not self.config.classes:
            raise Refusal("This VideoMAE has no classifier.", hint="Train one: --task recognition.")
        video_BD = F.dropout(self.encode_video(batch), self.head_dropout, self.training)
        return cast(Tensor, self.head(video_BD))


KEYS = Keys(Rule("{rest}", "{rest}"))
"""Pre-trained files: the authors' names are ours."""
TUNED_KEYS = Keys(
    Rule("fc_norm.{rest}", "fc_norm.{rest}"),
    Rule("head.{rest}", "head.{rest}"),
    Rule("encoder.{rest}", "{rest}"),
)
"""Fine-tuned files: the encoder at the root."""


def _config_of(state: Mapping[str, Tensor]) -> Config:
    shapes, tuned = Shapes(state), "head.weight" in state
    root = "" if tuned else "encoder."
    *_, tubelet, _, patch = shapes(root + "patch_embed.proj.weight")
    made = Config(stack_of(shapes, root), None, patch=patch, tubelet=tubelet)
    if tuned:
        return replace(made, classes=shapes("head.weight")[0])
    said, pixels = shapes("decoder.head.weight")[0], 3 * tubelet * patch**2
    if said != pixels:
        raise CheckpointError(f"The decoder says {said} numbers of a tubelet, which has {pixels}.")
    return replace(made, decoder=stack_of(shapes, "decoder."))


class DualMasking(BasePairObjective):
    """Hide most tubelets of each clip, and learn to say the pixels of some of them.

    mask_ratio     share of the places that the encoder does not see
    decoder_ratio  share of the tubelets that are not reconstructed; 0: all hidden ones are (VideoMAE V1)
    normalise      targets are standardised, each tubelet and channel by itself
    samples        masks, and crops, of each clip that is read: reading is shared by as many
    crops          each is a part of the clip, of 66 to 100 % of its sides

    Every draw comes from torch's global generator.
    """

    needs: Needs = Needs((VideoField(),))

    def __init__(
        self,
        model: VideoMae,
        *,
        mask_ratio: float = 0.9,
        decoder_ratio: float = 0.5,
        normalise: bool = True,
        samples: int = 4,
        crops: bool = True,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(weight_decay=weight_decay)
        if samples < 1:
            raise UsageError(f"Each clip is masked at least once, got samples={samples}.")
        self.mask_ratio, self.decoder_ratio, self.normalise = mask_ratio, decoder_ratio, normalise
        self.samples, self.crops = samples, crops
        model.check_decoder()
        with torch.random.fork_rng(devices=[]):
            self.masks(model.encoder.grid, 1)  # says so where there are no such masks
        # clips have equally many tubelets that count where cells run round, so parts may be averaged
        self.scope = "pair" if decoder_ratio and model.encoder.grid[0] % 4 else "local"

    def masks(self, grid: Grid, count: int) -> tuple[Tensor, Tensor]:
        """hidden_BN and skipped_BN of so many clips."""
        hidden_BN = tube_mask(count, grid, self.mask_ratio)
        if not self.decoder_ratio:
            return hidden_BN, ~hidden_BN
        return hidden_BN, running_cell_mask(count, grid, self.decoder_ratio)

    def outputs(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """A row's `error`, summed over the tubelets that count, and how many they are."""
        clip = cast(ClipBatch, batch["clip"])
        if not bool(clip.mask_BT.all()):
            warnings.warn(
                "Clips with too few frames for this model stay on their last one. Clean them out, or take a "
                "smaller stride.",
                stacklevel=2,
            )
        frames_BTCPP = model.held_frames(clip).repeat_interleave(self.samples, dim=0)
        if self.crops and self.training:
            frames_BTCPP = scaled_crops(frames_BTCPP)
        hidden_BN, skipped_BN = self.masks(model.encoder.grid, len(frames_BTCPP))
        found = self.errors(model, frames_BTCPP, hidden_BN, skipped_BN)
        return {name: sums_B.unflatten(0, (-1, self.samples)).sum(1) for name, sums_B in found.items()}

    def errors(
        self, model: VideoMae, frames_BTCPP: Tensor, hidden_BN: Tensor, skipped_BN: Tensor
    ) -> dict[str, Tensor]:
        """The same for given masks. A tubelet's error is a mean over its pixels."""
        seen_BV, said_BK = (kept(mask_BN).to(frames_BTCPP.device) for mask_BN in (hidden_BN, skipped_BN))
        patches_BNX = model.encoder.patches(frames_BTCPP)
        target_BKX = pixel_targets(take(patches_BNX, said_BK), _MEAN, _STD, normalise=self.normalise)
        numbers_BKX = model.reconstruct(patches_BNX, seen_BV, said_BK)
        counts_BK = hidden_BN.to(said_BK.device).gather(1, said_BK)
        error_BK = (numbers_BKX.float() - target_BKX).square().mean(-1)
        return {"error": (error_BK * counts_BK).sum(1), "counted": counts_BK.sum(1)}

    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"pixels": outputs["error"].sum() / outputs["counted"].sum()}

    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        """No decay on vectors, the mask token and the factors of cosine attention."""
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in model.named_parameters():
            groups[parameter.ndim > 1 and not name.endswith(("mask_token", ".scale"))].append(parameter)
        for decays, parameters in groups.items():
            yield {"params": parameters, "weight_decay": self.weight_decay * decays}

    def after_step(self, model: nn.Module) -> None:
        return


def _start(module: nn.Module) -> nn.Module:
    if isinstance(module, VideoMae):
        return module
    raise Refusal(
        f"VideoMAE cannot start from a {type(module).__name__}: it reads tubelets, not frames.",
        hint="Train a new one (--model vmae-small), or go on with a trained one (--init FOLDER).",
    )


_RECIPE = {"batch_size": 256, "eps": 1e-8}
_FIRST = {**_RECIPE, "lr": 1e-3, "betas": (0.9, 0.95), "lr_floor": 0.01}
_SECOND = {**_RECIPE, "lr": 7e-4, "betas": (0.9, 0.999), "lr_floor": 0.0014, "epochs": 50}
TRAINING = Training(DualMasking, _start, PRESETS, _FIRST)
RECOGNITION = Training(LayerDecay, _start, PRESETS, _SECOND)


def tiny() -> Config:
    return Config(StackConfig(32, 2, 2), StackConfig(24, 1, 2), image_size=16, patch=4, frames=8)


def example(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoMae(tiny()).eval()
        objective = DualMasking(model, mask_ratio=0.75)
        hidden_BN, skipped_BN = objective.masks(model.encoder.grid, 3)

    def run(clip: ClipBatch, hidden_BN: Tensor, skipped_BN: Tensor) -> dict[str, Tensor]:
        found = objective.errors(model, clip.frames_BTCHW, hidden_BN, skipped_BN)
        return {"video": model.encode_video(clip), **found, "loss": objective.loss(model, found)["pixels"]}

    frames_BTCPP = torch.randn(3, 8, 3, 16, 16, generator=generator)
    inputs = {"clip": world.clip_batch(frames_BTCPP), "hidden_BN": hidden_BN, "skipped_BN": skipped_BN}
    shapes = {"video": (3, 32), "error": (3,), "counted": (3,), "loss": ()}
    return Example(run, inputs, shapes, model, (*inputs, "video", "error", "counted"), "loss")


# --------------------------------------------------------------------------------------------------
# The claim
# --------------------------------------------------------------------------------------------------


def small_model(seed: int) -> VideoMae:
    """For clips of 16 pixels: four tubelets in each of four layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VideoMae(_vit((64, 2, 4), (48, 1, 3), image_size=SIDE, patch=8, frames=world.FRAMES))


def pretrain(model: VideoMae, frames_NTCPP: Tensor, steps: int, seed: int) -> None:
    """Dual masking; with four places in a layer three are hidden, which is less than nine in ten."""
    objective = DualMasking(model, mask_ratio=0.75, samples=1, crops=False)
    label_N = torch.zeros(len(frames_NTCPP))
    fit_clips(model, objective, frames_NTCPP, label_N, steps=steps, lr=1e-3, seed=seed)


_ARMS = ("from scratch", "pre-trained on shuffled frames", "pre-trained")


def run_claim(
    arm: str, seed: int, *, clips: int = 2000, first: int = 1400, second: int = 250, test: int = 800
) -> dict[str, float]:
    """Fine-tune on the same 256 labelled clips; the arms differ in what the model is before."""
    model = small_model(seed)
    if arm != _ARMS[0]:
        pretrain(model, unlabelled(seed, clips, shuffled=arm == _ARMS[1]), first, seed)
    return few_label_accuracy(model, seed, labelled=256, steps=second, test=test)


CLAIM = Claim(
    statement="Filling in hidden parts of unlabelled clips first, a video model learns more from few labels.",
    data="order clips of 8 frames, 2000 without labels and 256 with; test clips show things no label is for",
    metric="action, top-1",
    arms=_ARMS,
    ours=_ARMS[2],
    baseline=_ARMS[0],
    run=run_claim,
    seeds=(3, 4, 5),  # 0 to 2 served to settle the claim
)
