"""MobileCLIP: small fast towers, and training that learns from teachers without running them.

Two ideas. The image tower (FastViT) and the smallest text tower are built of branches that fold into
single convolutions once trained. And the data are reinforced once: beside each pair stand synthetic
captions, the parameters of some strong augmentations, and the vectors that large teachers give to
each augmented picture and each caption. A student then trains towards the teachers' similarities
as fast as it would without teachers.

Vasu, Pouransari, Faghri, Vemulapalli, Tuzel: "MobileCLIP: Fast Image-Text Models through Multi-Modal
Reinforced Training", CVPR 2024, arXiv 2311.17049. Official code: apple/ml-mobileclip (code MIT, weights
and reinforced data under Apple's own licences).

Symbols: lambda_0, lambda_1 are `contrastive_weight`, `distill_weight`; K teachers of widths
`teacher_dims`, their temperature 1 / `teacher_scale`; the pull towards their similarities is
`training.soft_targets.soft_cross_entropy`. Equation numbers are not cited: this file was written from
the official code, not from the paper.

Known differences
- The teachers' softmax is over the global batch and no B x B matrix is held; the official code has one
  softmax a process with all texts (`--local-loss`), which gives the same loss.
- BatchNorm sees one process's part of the batch, as in the official code. With micro-batches it sees one
  of these at a time and updates its running statistics twice a step: gradients of a student that has
  BatchNorm then differ from those of the whole batch.
- Token embeddings start at standard deviation 0.02 and the text projection at width^-0.5 (official: 1,
  and memory as it was found: that code loads weights and trains other models).
- `encode_text` of a causal tower (B) leaves out what follows the last end of text: exact.
- Heads and causality are not in the weights: `from_official` takes 64 channels a head and a causal text
  tower beside the ViT only, which holds for the four published models.
- `encode_video`, the mean of the normalised frame vectors, is ours; so is refusing normalised pixels.

Axis letters: B batch, N texts, M videos, T frames, L tokens, D width, S the teachers' widths together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.keys import Keys, Rule
from moviola.clip.model import CLIP, mean_of_frames
from moviola.clip.native import assign
from moviola.data import noisy_pairs as world
from moviola.metrics.classification import topk_accuracy
from moviola.parts.backbones.fastvit import FastVit, FastVitConfig
from moviola.parts.backbones.mobile_config import (
    MobileClipConfig,
    infer_config,
    mobileclip_b,
    mobileclip_s0,
    mobileclip_s1,
    mobileclip_s2,
)
from moviola.parts.backbones.mobile_transformer import MobileText, MobileTextConfig, MobileVit
from moviola.parts.backbones.reparam import fold_branches
from moviola.training.nce import info_nce
from moviola.training.objectives import BasePairObjective, Contrastive
from moviola.training.soft_targets import soft_cross_entropy, widths_of
from moviola.types import (
    Batch,
    Claim,
    ClipBatch,
    Example,
    FrameSpec,
    Needs,
    Recipe,
    ReinforcedField,
    Training,
    UsageError,
)

Config = MobileClipConfig


PRESETS: dict[str, Callable[[], MobileClipConfig]] = {
    made.__name__: made for made in (mobileclip_s0, mobileclip_s1, mobileclip_s2, mobileclip_b)
}


def create(name: str) -> MobileClip:
    """An untrained model by its published name; `UsageError` lists the names for any other."""
    wanted = name.lower().replace("-", "_")
    if wanted not in PRESETS:
        raise UsageError(f"There is no MobileCLIP called {name!r}.", hint=f"Use {', '.join(PRESETS)}.")
    return MobileClip(PRESETS[wanted]())


class MobileClip(nn.Module):
    """Both towers and the learned temperature. Implements `moviola.types.Encoder`.

    Pixels are in [0, 1], not normalised; texts are whole contexts, zero-padded (`recipe` and the
    tokenizer of `load` see to both). A video is the mean of its normalised frame vectors.
    """

    has_text = True
    separable = True
    adaptation: Literal["none", "embedding", "classifier"] = "none"
    frame_spec = FrameSpec(count=None, sampler="middle", padding="mask")

    def __init__(self, config: MobileClipConfig) -> None:
        super().__init__()
        self.config = config
        self.visual: FastVit | MobileVit
        if isinstance(config.vision, FastVitConfig):
            self.visual = FastVit(config.vision, config.embed_dim, folded=config.folded)
        else:
            self.visual = MobileVit(config.vision, config.embed_dim)
        self.text = MobileText(config.text, config.embed_dim, folded=config.folded)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> MobileClip:
        """Untrained, from the JSON form of its configuration."""
        return cls(MobileClipConfig.from_json(data))

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], config: MobileClipConfig | None = None) -> MobileClip:
        """The authors' checkpoint, folded or not; the configuration is read off the shapes unless given."""
        with torch.device("meta"):
            made = cls(config or infer_config(state))
        assign(made, KEYS.from_official(state), source="MobileCLIP checkpoint")
        return made.eval()

    @property
    def dim(self) -> int:
        return self.config.embed_dim

    @property
    def context_length(self) -> int:
        return self.config.text.context_length

    @property
    def text_config(self) -> MobileTextConfig:
        return self.config.text

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.text.embedding_layer

    @property
    def recipe(self) -> Recipe:
        """Bilinear to the tower's size, centre crop, pixels in [0, 1] as they are."""
        size = self.config.vision.image_size
        return Recipe(
            size=(size, size) if isinstance(size, int) else size,
            interpolation="bilinear",
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            context_length=self.context_length,
        )

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """pixels_BCHW in [0, 1] -> image_BD, not normalised; `UsageError` for other pixels."""
        if pixels_BCHW.numel():
            low, high = (value.item() for value in pixels_BCHW.detach().aminmax())
            if low < -0.25 or high > 1.25:
                raise UsageError(
                    f"MobileCLIP takes pixels from 0 to 1, without mean and standard deviation; got values "
                    f"from {low:.2f} to {high:.2f}.",
                    hint="Prepare pictures by the model's own recipe; divide uint8 pixels by 255.",
                )
        return self.visual(pixels_BCHW)

    def encode_text(self, tokens_NL: Tensor) -> Tensor:
        """tokens_NL -> text_ND, not normalised."""
        return self.text.encode(tokens_NL)

    def encode_frames(self, batch: ClipBatch) -> Tensor:
        """Each frame through the image tower: ClipBatch -> frames_BTD, not normalised."""
        frames_BTCHW = batch.frames_BTCHW
        return self.encode_image(frames_BTCHW.flatten(0, 1)).unflatten(0, frames_BTCHW.shape[:2])

    def encode_video(self, batch: ClipBatch) -> Tensor:
        return mean_of_frames(self.encode_frames(batch), batch.mask_BT)

    def pool(self, video: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        return video

    def score(self, text_ND: Tensor, video: Tensor, mask_MT: Tensor | None = None) -> Tensor:
        """Cosine times the logit scale (at most 100): text_ND, video_MD -> scores_NM."""
        scale = self.logit_scale.exp().clamp(max=100)
        return scale * F.normalize(text_ND, dim=-1) @ F.normalize(video, dim=-1).T


def reparameterize(model: MobileClip) -> MobileClip:
    """A copy whose branches are folded: the same vectors with fewer steps. The model must be in eval mode."""
    made = cast(MobileClip, fold_branches(model))
    made.config = replace(model.config, folded=True)
    return made


KEYS = Keys(
    Rule("visual.{rest}", "image_encoder.model.{rest}"),
    Rule("text.{rest}", "text_encoder.{rest}"),
    Rule("logit_scale", "logit_scale"),
)
"""Folded or not; the names inside the towers are the authors' own."""


# --------------------------------------------------------------------------------------------------
# Reinforced training
# --------------------------------------------------------------------------------------------------


class ReinforcedObjective(BasePairObjective):
    """`contrastive_weight` * CLIP + `distill_weight` * distillation, once with the real and once with the
    synthetic captions, added. The student is any model with `encode_image` and `encode_text`.

    The authors' weights are (0, 1) for DataCompDR-12M and the S models, (0.25, 0.75) for B on
    DataCompDR-1B. `teacher_dims`: the widths of the teachers whose vectors were stored one after the
    other, as numbers or as text ("768,768"); None: one teacher. `synthetic=False` leaves the synthetic
    captions out.
    """

    needs: Needs = Needs((ReinforcedField(),))

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        teacher_dims: Sequence[int] | int | str | None = None,
        contrastive_weight: float = 0.0,
        distill_weight: float = 1.0,
        teacher_scale: float = 100.0,
        average_after_softmax: bool = True,
        synthetic: bool = True,
        weight_decay: float = 0.2,
        max_logit_scale: float = 100.0,
    ) -> None:
        super().__init__(model, weight_decay=weight_decay, max_logit_scale=max_logit_scale)
        if min(contrastive_weight, distill_weight) < 0 or contrastive_weight + distill_weight <= 0:
            raise UsageError(
                "contrastive_weight and distill_weight must not be negative, and not both 0, got "
                f"{contrastive_weight} and {distill_weight}."
            )
        if not 0 < teacher_scale < math.inf:
            raise UsageError(f"teacher_scale must be positive, got {teacher_scale}.")
        self.teacher_dims = widths_of(teacher_dims)
        self.contrastive_weight, self.distill_weight = contrastive_weight, distill_weight
        self.teacher_scale, self.average_after_softmax = teacher_scale, average_after_softmax
        self.captions = ("text", "synthetic") if synthetic else ("text",)

    def outputs(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        wanted = ["image", *self.captions, "teacher_image", *(f"teacher_{name}" for name in self.captions)]
        missing = [name for name in wanted if name not in batch]
        if missing:
            raise UsageError(
                f"Reinforced training needs {', '.join(missing)} in the batch.",
                hint="Make a reinforced set with: moviola reinforce",
            )
        image_BD = F.normalize(model.encode_image(batch["image"]).float(), dim=-1)
        # one pass for all captions, so that BatchNorm in a text tower sees both kinds together
        tokens_BL = torch.cat([batch[name] for name in self.captions])
        text_ND = F.normalize(model.encode_text(tokens_BL).float(), dim=-1)
        vectors = dict(zip(self.captions, text_ND.chunk(len(self.captions)), strict=True))
        teachers = {name: batch[name] for name in wanted if name.startswith("teacher_")}
        return {"image": image_BD, **vectors, **teachers, "logit_scale": model.logit_scale}

    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scale, image_BD = outputs["logit_scale"].exp(), outputs["image"]
        losses: dict[str, Tensor] = {}
        if self.contrastive_weight:
            parts = [info_nce(image_BD, outputs[name], scale) for name in self.captions]
            losses["contrastive"] = self.contrastive_weight * torch.stack(parts).sum()
        if self.distill_weight:
            parts = [self._distill(outputs, name, scale) for name in self.captions]
            losses["distill"] = self.distill_weight * torch.stack(parts).sum()
        return losses

    def _distill(self, outputs: Mapping[str, Tensor], name: str, scale: Tensor) -> Tensor:
        return soft_cross_entropy(
            outputs["image"],
            outputs[name],
            scale,
            outputs["teacher_image"],
            outputs[f"teacher_{name}"],
            teacher_scale=self.teacher_scale,
            teacher_dims=self.teacher_dims,
            average_after_softmax=self.average_after_softmax,
        )


TRAINING = Training(
    ReinforcedObjective,
    presets=PRESETS,
    recipe={"lr": 1e-3, "betas": (0.9, 0.95), "warmup": 1000, "clip_grad": 1.0},
)


def tiny() -> MobileClipConfig:
    vision = FastVitConfig(
        (1, 1), (8, 16), (2.0, 2.0), ("repmixer", "attention"), (False, True), (False, True),
        head_dim=8, layer_scale=0.3, image_size=32,
    )  # fmt: skip
    text = MobileTextConfig("mct", False, 8, 32, 16, 1, 2, 2.0, 3, 2.0)
    return MobileClipConfig(16, vision, text)


def example(seed: int) -> Example:
    generator, objective = torch.Generator().manual_seed(seed), ReinforcedObjective(contrastive_weight=0.25)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MobileClip(tiny()).eval()

    def run(pixels_BCHW: Tensor, tokens_BL: Tensor, teacher_BS: Tensor) -> dict[str, Tensor]:
        image_BD, text_BD = model.encode_image(pixels_BCHW), model.encode_text(tokens_BL)
        batch = {"image": pixels_BCHW, "text": tokens_BL, "synthetic": tokens_BL.roll(1, 1)}
        names = ("teacher_image", "teacher_text", "teacher_synthetic")
        losses = objective(model, batch | {name: teacher_BS.roll(n, 1) for n, name in enumerate(names)})
        return {
            "image": image_BD,
            "text": text_BD,
            "scores": model.score(text_BD, image_BD),
            "loss": losses["contrastive"] + losses["distill"],
        }

    tokens_BL = torch.randint(1, 30, (4, 8), generator=generator)
    tokens_BL[:, -1] = 31
    teacher_BS = F.normalize(torch.randn(4, 6, generator=generator), dim=1)
    pixels_BCHW = torch.rand(4, 3, 32, 32, generator=generator)
    inputs = {"pixels_BCHW": pixels_BCHW, "tokens_BL": tokens_BL, "teacher_BS": teacher_BS}
    batched = (*inputs, "image", "text")
    shapes = {"image": (4, 16), "text": (4, 16), "scores": (4, 4), "loss": ()}
    return Example(run, inputs, shapes, model, batched, "loss")


def _small_clip(width: int, dim: int) -> CLIP:
    side, context, words = world.SIZES
    vision = VitConfig(side, 8, width=width, layers=1, heads=2, stem=((16, 0), (32, 0), (width, 0)))
    return CLIP(ClipConfig(dim, vision, TextConfig(context, words, width=48, layers=1, heads=2)))


def _fit(
    model: CLIP, objective: BasePairObjective, batches: Iterator[Batch], steps: int, peak: float
) -> CLIP:
    optimizer = torch.optim.AdamW(objective.param_groups(model), lr=peak, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)
    for batch in batches:
        torch.stack(list(objective(model, batch).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        objective.after_step(model)
    return model.eval()


def _accuracy(model: CLIP, seed: int) -> float:
    pixels_NCHW, label_N, prompts_CL = world.labelled(seed, 20)
    with torch.no_grad():
        scores_CN = model.score(model.encode_text(prompts_CL), model.encode_image(pixels_NCHW))
    return topk_accuracy(scores_CN.T.numpy(), label_N.numpy(), (1,))["top1"]


@lru_cache(maxsize=1)
def _reinforced(seed: int) -> tuple[world.NoisyPairs, world.Reinforcement, float]:
    """The students' noisy set, what a teacher adds to it, and the teacher's own accuracy.

    The teacher is wider, and has seen 8000 other pictures with captions that are all their own.
    """
    torch.manual_seed(seed)
    steps, clean = 600, world.noisy_pairs(1000 + seed, 8000, mismatched=0.0, views=1)
    batches = world.batches(clean, None, seed=seed, size=64, steps=steps)
    teacher = _fit(_small_clip(64, 48), Contrastive(), batches, steps, 3e-3)
    pairs = world.noisy_pairs(seed, 4000, mismatched=0.5, views=2)
    added = world.reinforce(pairs, teacher.encode_image, teacher.encode_text)
    return pairs, added, _accuracy(teacher, 50 + seed)


def run_claim(arm: str, seed: int, *, steps: int = 400) -> dict[str, float]:
    """Train the same small CLIP on the same pictures, views and noisy captions; then name new pictures."""
    pairs, added, teacher = _reinforced(seed)
    objective: dict[str, BasePairObjective] = {
        "clip": Contrastive(),
        "distil-real": ReinforcedObjective(synthetic=False, weight_decay=0.1),
        "reinforced": ReinforcedObjective(weight_decay=0.1),
    }
    torch.manual_seed(seed)
    batches = world.batches(pairs, added, seed=seed, size=64, steps=steps)
    student = _fit(_small_clip(48, 32), objective[arm], batches, steps, 2e-3)
    return {"zero-shot top-1": _accuracy(student, 50 + seed), "teacher's top-1": teacher}


CLAIM = Claim(
    statement="Stored teacher vectors teach a student more in as many steps than noisy pairs alone.",
    data="made world: 4000 pairs of 30 classes, half the captions another picture's; new pictures to name",
    metric="zero-shot top-1",
    arms=("clip", "distil-real", "reinforced"),
    ours="reinforced",
    baseline="clip",
    run=run_claim,
)
