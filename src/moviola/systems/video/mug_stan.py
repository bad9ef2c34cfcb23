"""Mug-STAN: a branch beside CLIP's last layers sees time, and a score that passes over what does not match.

CLIP runs on the frames one by one and stays as it is. A branch (STAN, `parts.stan`) begins with what one of
its last layers gives, and in `depth` levels lets patches attend along time, then within their frame by a copy
of CLIP's own layer; each level takes in the next layer of CLIP. The branch's class token is added to that of
every frame. A text then meets the mean of the frames, or its words meet the frames by Mug (`parts.mug`).

Liu, Huang, Gao, Li, Li: "Mug-STAN: Adapting Image-Language Pretrained Models for General Video
Understanding", arXiv 2311.15075. Official code: farewellthree/STAN (Apache-2.0).

Symbols: x_l is a tapped layer x_FLD, y the pair (cls_BD, patches_BTPD) in `Stan.forward`, r and q are
word_nlm and frame_nmT in `parts.mug`; STAN_T and STAN_S are `TimeLayer` and `SpaceLayer` of `parts.stan`.

Known differences
- Padded frames of short clips are masked out; officially a clip's frames repeat until there are enough. The
  layout is (B, T, 3, H, W); the official code takes an axis of 3 in the place of T for colours.
- Words are what stands before and at the end token; officially every id but 0, also "!" where its id is 0.
- Texts have the model's context length, officially 32 tokens (77 on DiDeMo).
- In the full mode of Mug padding does not count; `parts.mug` can restore the official leak.
- Time attention starts as the house's CLIP does, not as PyTorch's linear maps. It starts silent in both.
- The branch's last layer computes its class token only, and Mug holds no similarities of all pairs: exact.
- Only `selfattn` is there; `cls_residue`, off in all released configurations, is left out.
- Equation numbers are not cited: this file was written from the official code, not from the paper.

Axis letters: B clips, T frames, F = B * T frames of all clips, P patches, L tokens of a frame (class token
first) or of a text, D width, E embedding width, N texts, M videos, C classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.config import ClipConfig, TextConfig, VitConfig, vit_b_16, vit_b_32
from moviola.clip.formats.openai import infer_config
from moviola.clip.model import CLIP, TextTower
from moviola.clip.native import assign
from moviola.clip.vit import VisionTransformer
from moviola.clip.weights import strip_prefix
from moviola.data import order_clips as world
from moviola.data.stray_frames import stray_clips
from moviola.metrics.classification import topk_accuracy
from moviola.metrics.retrieval import retrieval_metrics
from moviola.parts.mug import mug_scores
from moviola.parts.stan import STAN_KEYS, Head, MugStanConfig, Stan, check_clips, mean_of_real
from moviola.training.brief_rows import fit_rows
from moviola.training.objectives import BasePairObjective, decay_groups
from moviola.training.recognition import Recognition
from moviola.training.video_text import norm_softmax_loss
from moviola.types import (
    Batch,
    CheckpointError,
    Claim,
    ClipBatch,
    Example,
    FrameSpec,
    Needs,
    TextField,
    Training,
    UsageError,
    VideoField,
)

Config = MugStanConfig


def b_32() -> MugStanConfig:
    """The paper's model for retrieval."""
    return MugStanConfig.over(vit_b_32(), head="mug")


def b_16() -> MugStanConfig:
    return MugStanConfig.over(vit_b_16(), head="mug")


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


class MugStan(TextTower):
    """A CLIP with the branch, for clips of 1 to `most_frames` frames. Implements `moviola.types.Encoder`.

    With the head `mean` it is separable. With `mug` a video is its frames, and a text the words of
    `encode_words`; one vector a text (`encode_text`) is then scored with the frames that it fits.
    """

    has_text = True
    adaptation: Literal["none", "embedding", "classifier"] = "none"

    def __init__(self, config: MugStanConfig) -> None:
        super().__init__(config.text, config.embed_dim, config.activation)
        self.config = config
        self.visual = VisionTransformer(cast(VitConfig, config.vision), config.embed_dim, config.activation)
        self.stan = Stan(config)

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> MugStan:
        """Untrained, from the JSON form of its configuration."""
        return cls(MugStanConfig.from_json(data))

    @classmethod
    def from_clip(cls, clip: CLIP, **options: Any) -> MugStan:
        """This CLIP and a new branch: copies of its last layers, silent time attention, random times.

        `options` are fields of the configuration: `head`, `depth`, `frames`, ...
        """
        made = cls(MugStanConfig.over(clip.config, **options))
        state = {**made.state_dict(), **{k: v for k, v in clip.state_dict().items() if k != "logit_scale"}}
        made.load_state_dict(state)
        blocks = made.visual.transformer.resblocks
        for space, block in zip(made.stan.space, blocks[-made.config.depth :], strict=True):
            space.load_state_dict(block.state_dict())
        return made.to(clip.logit_scale.device).eval()

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor]) -> MugStan:
        """The authors' checkpoint. Sizes follow from the shapes, heads are 64 wide; no file says its head."""
        ours = KEYS.from_official(strip_prefix(dict(state), "module."))
        ours = {name: tensor.contiguous() for name, tensor in ours.items()}
        clip = infer_config(ours, source="The Mug-STAN checkpoint")
        if "stan.time_embedding" not in ours:
            raise CheckpointError(
                "The checkpoint has no backbone.STAN_time_embed.weight: no branch is in it."
            )
        depth = len({name.split(".")[2] for name in ours if name.startswith("stan.space.")})
        most = len(ours["stan.time_embedding"])
        with torch.device("meta"):
            made = cls(MugStanConfig.over(clip, depth=depth, most_frames=most, frames=min(12, most)))
        assign(made, ours, source="Mug-STAN checkpoint")
        return made.eval()

    def use_head(self, head: Head) -> Self:
        """The same weights with another head: none has any of its own."""
        self.config = replace(self.config, head=head)
        return self

    @property
    def separable(self) -> bool:
        return self.config.head == "mean"

    @property
    def frame_spec(self) -> FrameSpec:
        return FrameSpec(self.config.frames, "middle", "mask")

    @property
    def dim(self) -> int:
        return self.config.embed_dim

    @property
    def context_length(self) -> int:
        return self.config.text.context_length

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of 1 / temperature, fixed."""
        return torch.tensor(-math.log(self.config.temperature))

    def encode_words(self, tokens_NL: Tensor) -> Tensor:
        """words_NLE: every token up to the end of its text, not normalised; what follows is zero."""
        ends_N1 = self.eot_positions(tokens_NL).unsqueeze(1)
        longest = int(ends_N1.max()) + 1 if len(tokens_NL) else 1
        words_NLE = self.forward_text(tokens_NL[:, :longest]).tokens_BLD @ self.text_projection
        padding_NL = torch.arange(longest, device=ends_N1.device) > ends_N1
        words_NLE = words_NLE.masked_fill(padding_NL.unsqueeze(-1), 0)
        return F.pad(words_NLE, (0, 0, 0, tokens_NL.shape[1] - longest))

    def encode_frames(self, batch: ClipBatch) -> Tensor:
        """ClipBatch -> frames_BTE, not normalised: CLIP's frames, each with the video's token added."""
        check_clips(batch, self.config.most_frames)
        pixels_FCHW, mask_BT = batch.frames_BTCHW.flatten(0, 1), batch.mask_BT
        layers = len(self.visual.transformer.resblocks)
        taps = range(layers - self.config.depth, layers)
        x_FLD, tapped = self.visual.transformer(self.visual.embed(pixels_FCHW), taps)
        height, width = (side // self.visual.config.patch_size for side in pixels_FCHW.shape[-2:])
        places_LD = self.visual.positions((height, width)).to(x_FLD.dtype)
        video_BD = self.stan([tapped[n] for n in taps], self.visual.class_embedding, places_LD, mask_BT)
        frames_BTD = x_FLD[:, 0].unflatten(0, mask_BT.shape) + video_BD.unsqueeze(1)
        return self.visual.ln_post(frames_BTD) @ self.visual.proj

    def encode_video(self, batch: ClipBatch) -> Tensor:
        """ClipBatch -> video_BE, the mean of the frames' vectors; frames_BTE where the head is Mug."""
        frames_BTE = self.encode_frames(batch)
        return self.pool(frames_BTE, batch.mask_BT) if self.separable else frames_BTE

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """A picture as a clip of one frame: image_BE, not normalised."""
        mask_B1 = torch.ones(len(pixels_BCHW), 1, dtype=torch.bool, device=pixels_BCHW.device)
        return self.encode_frames(ClipBatch(pixels_BCHW.unsqueeze(1), mask_B1.float() * 0, mask_B1))[:, 0]

    def pool(self, video: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """frames_BTE -> the mean of the real ones, as they are; video_BE stays."""
        return video if video.ndim == 2 else mean_of_real(video, mask_BT)

    def score(self, text_ND: Tensor, video: Tensor, mask_MT: Tensor | None = None) -> Tensor:
        """scores_NM over the temperature: cosines, or Mug of words (N, L, E) or whole texts (N, E)."""
        if self.separable:
            if text_ND.ndim != 2 or video.ndim != 2:
                raise UsageError(
                    "The head `mean` compares a vector a text with a vector a video, got "
                    f"{tuple(text_ND.shape)} and {tuple(video.shape)}.",
                    hint='For words and frames: use_head("mug").',
                )
            scores_NM = F.normalize(text_ND, dim=-1) @ F.normalize(video, dim=-1).T
        else:
            words_NLE = text_ND if text_ND.ndim == 3 else text_ND.unsqueeze(1)
            frames_MTE = video if video.ndim == 3 else video.unsqueeze(1)
            word_NL, full = words_NLE.ne(0).any(-1), self.config.head == "mug-full"
            scores_NM = mug_scores(words_NLE, frames_MTE, word_NL, mask_MT, tau=self.config.tau, full=full)
        return scores_NM / self.config.temperature

    def score_tokens(self, tokens_NL: Tensor, video: Tensor, mask_MT: Tensor | None = None) -> Tensor:
        """`score` of the texts' words, where the head compares words: what the paper ranks by."""
        text = self.encode_text(tokens_NL) if self.separable else self.encode_words(tokens_NL)
        return self.score(text, video, mask_MT)


KEYS = STAN_KEYS


class MugStanObjective(BasePairObjective):
    """The paper's training on clips and their texts: both cross-entropies, added, at the fixed temperature.

    head           trains and leaves the model with this head; None: with its own
    stan_lr_scale  the branch's learning rate as a multiple of the run's
    freeze_clip    train the branch alone
    """

    needs: Needs = Needs((VideoField(), TextField()))

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        head: Head | None = None,
        stan_lr_scale: float = 10.0,
        freeze_clip: bool = False,
        weight_decay: float = 0.02,
    ) -> None:
        super().__init__(model, weight_decay=weight_decay)
        self.stan_lr_scale = stan_lr_scale
        if isinstance(model, MugStan):
            model.use_head(head or model.config.head)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith("stan.") or not freeze_clip)

    def outputs(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        encode = model.encode_text if model.separable else model.encode_words
        clip: ClipBatch = batch["clip"]
        video = model.encode_video(clip).float()
        return {"text": encode(batch["text"]).float(), "video": video, "mask": clip.mask_BT}

    def loss(self, model: Any, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mask = None if model.separable else outputs["mask"]
        return {"contrastive": norm_softmax_loss(model.score(outputs["text"], outputs["video"], mask), 1.0)}

    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        branch = {id(p) for name, p in model.named_parameters() if name.startswith("stan.")}
        for group in decay_groups(model, self.weight_decay):
            for scale, new in ((self.stan_lr_scale, True), (1.0, False)):
                params = [p for p in group["params"] if (id(p) in branch) is new]
                if params:
                    yield {**group, "params": params, "lr_scale": scale}


class MugStanRecognition(Recognition):
    """Naming of actions by cosine: the image tower and the branch train, texts are frozen.

    Options as in `Recognition`, but plain cross-entropy of unmixed clips unless said otherwise.
    """

    def __init__(
        self, model: nn.Module, tokens_CL: Tensor, *, stan_lr_scale: float = 10.0, **options: Any
    ) -> None:
        plain = {"label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "weight_decay": 0.02}
        scales = {"stan.": stan_lr_scale}
        super().__init__(
            model, tokens_CL, train=("visual.", "stan."), lr_scales=scales, **{**plain, **options}
        )


def _start(module: nn.Module) -> MugStan:
    return module if isinstance(module, MugStan) else MugStan.from_clip(cast(CLIP, module))


_RECIPE = {"lr": 2e-6, "batch_size": 128, "betas": (0.9, 0.98), "eps": 1e-8, "clip_grad": 5.0}
TRAINING = Training(
    MugStanObjective, start=_start, presets={"mug-stan-b-32": b_32, "mug-stan-b-16": b_16}, recipe=_RECIPE
)
RECOGNITION = Training(MugStanRecognition, start=_start, recipe=_RECIPE)


def tiny() -> MugStanConfig:
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=3, heads=2)
    text = TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2)
    return MugStanConfig.over(ClipConfig(16, vision, text), depth=2, head="mug", frames=3, most_frames=6)


def example(seed: int) -> Example:
    """Clips of one to three frames; time attention is not silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MugStan(tiny()).eval()
        for layer in model.stan.time:
            nn.init.normal_(cast(Any, layer).temporal_fc.weight, std=0.2)
    objective = MugStanObjective(model)

    def run(clip: ClipBatch, tokens_BL: Tensor) -> dict[str, Tensor]:
        frames_BTE, words_BLE = model.encode_video(clip), model.encode_words(tokens_BL)
        return {
            "frames": frames_BTE,
            "words": words_BLE,
            "shortlist": model.pool(frames_BTE, clip.mask_BT),
            "scores": model.score(words_BLE, frames_BTE, clip.mask_BT),
            "loss": objective(model, {"clip": clip, "text": tokens_BL})["contrastive"],
        }

    mask_BT = torch.arange(3) < torch.tensor([[3], [1], [2], [3]])
    frames_BTCHW = torch.randn(4, 3, 3, 16, 16, generator=generator) * mask_BT[..., None, None, None]
    tokens_BL = torch.tensor([[30, n, n + 7, 31, 0, 0, 0, 0] for n in range(1, 5)])
    inputs = {
        "clip": ClipBatch(frames_BTCHW, torch.arange(3.0).expand(4, -1), mask_BT),
        "tokens_BL": tokens_BL,
    }
    shapes = {"frames": (4, 3, 16), "words": (4, 8, 16), "shortlist": (4, 16), "scores": (4, 4), "loss": ()}
    return Example(run, inputs, shapes, model, ("clip", "tokens_BL", "frames", "words", "shortlist"), "loss")


# --------------------------------------------------------------------------------------------------
# The claim
# --------------------------------------------------------------------------------------------------


def run_claim(arm: str, seed: int, *, steps: int = 200, clips: int = 1600) -> dict[str, float]:
    """Train one arm to name eight actions; measure it on things and speeds that it has not met."""
    made = partial(world.order_clips, seed, frames=4)
    train, test = made(clips), made(clips // 4, split="test")
    if arm == "shuffled frames":
        train, test = train.shuffled(seed), test.shuffled(seed + 1)
    tokens_CL = world.tokens(train.classes)

    head: Head = "mug" if arm == "mug-stan" else "mean"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = world.image_clip(seed)
        new = MugStan.from_clip(start, depth=2, head=head)
        model: Any = copy.deepcopy(start) if arm == "frame mean" else new
        naming = MugStanRecognition(model, tokens_CL, stan_lr_scale=4)
        fit_rows(model, naming, train.labelled, clips, steps=steps, batch=24, lr=5e-4, seed=seed)
        figures = {}
        if arm.endswith("stan"):
            figures = stray_figures(start, head, seed, steps=steps // 2, rows=clips // 8)
    with torch.inference_mode():
        videos = [model.encode_video(test.batch(b)) for b in torch.arange(len(test)).split(50)]
        scores_NC = model.score(model.encode_text(tokens_CL), torch.cat(videos)).T
    top1 = topk_accuracy(scores_NC, test.label_N, (1,))["top1"]
    return {"pair accuracy": world.pair_accuracy(scores_NC, test.label_N), "action, top-1": top1, **figures}


def stray_figures(start: CLIP, head: Head, seed: int, *, steps: int, rows: int) -> dict[str, float]:
    """R@1 of captions among new clips without and with stray frames, trained on clips with them by `head`."""
    train, test = stray_clips(seed, 2 * rows), stray_clips(seed + 500, rows)
    model = MugStan.from_clip(start, depth=2, head=head)

    def batch(rows: np.ndarray) -> Batch:
        return {"clip": world.clip_batch(train.mixed_NRCSS[rows]), "text": train.tokens_NL[rows]}

    objective = MugStanObjective(model, stan_lr_scale=2)
    fit_rows(model, objective, batch, 2 * rows, steps=steps, batch=32, lr=1e-4, seed=seed)
    figures = {}
    with torch.inference_mode():
        for kind, frames in (("own frames", test.own_NTCSS), ("stray frames too", test.mixed_NRCSS)):
            scores_NM = model.score_tokens(test.tokens_NL, model.encode_video(world.clip_batch(frames)))
            figures[f"R@1, {kind}"] = retrieval_metrics(scores_NM, range(rows))["t2v"]["R1"]
    return figures


CLAIM = Claim(
    statement="A branch that sees time tells actions that the mean of frames cannot.",
    data="order clips: eight actions in pairs that are each other backwards, 4 frames; new things and speeds",
    metric="pair accuracy",
    arms=("frame mean", "shuffled frames", "stan", "mug-stan"),
    ours="stan",
    baseline="frame mean",
    run=run_claim,
)
