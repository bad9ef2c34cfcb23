"""RS-M-CLIP: a multilingual CLIP for pictures from the air, by translated captions and self-distillation.

A CLIP whose text tower reads many languages (ViT-B/32 beside XLM-RoBERTa) goes on training on captions
of remote sensing pictures and their translations: each time, a caption in one of its languages. Such
pictures are full of small things, so the image tower also teaches itself: a slowly moving average of it
sees two large crops, and the tower must give the same soft prototypes for small ones.

Silva, Magalhaes, Tuia, Martins: "Multilingual Vision-Language Pre-training for the Remote Sensing
Domain", 2024, arXiv 2410.23370. Official repository: DannielSilva/RS-M-CLIP, a readme only; weights
`joaodaniel/RS-M-CLIP` on the hub, in OpenCLIP's format. The distillation follows DINO
(facebookresearch/dino), the text tower OpenCLIP's `HFTextEncoder`.

Symbols: lambda is `distillation_weight`, K `prototypes`, c `centre`, m `momentum`, tau_s and tau_t the
`student_temperature` and `teacher_temperature`.

Known differences (the authors' training code is not public; "ours" is our reading)
- Both large crops are contrasted with the text, as in SILC (`global_crops_contrasted`); ours. The head
  reads the image vector of the joint space, before it is made unit; ours.
- The teacher's momentum is fixed, since the captions keep moving the student; `momentum_end` gives DINO's
  cosine. lambda = 1, 8 small crops and K = 4096 are ours (DINO has 65,536 for a million pictures).
- One caption a picture and step, its language drawn at random: translations of one picture in one batch
  would count as false negatives. A row that comes twice in a batch is refused.
- The teacher's image tower runs in eval mode; statistics of BatchNorm, where it has any, move with its
  weights. Loss, centre and the heads' BatchNorm see the global batch, whatever the number of processes.
- The last layer is not held still in the first epoch, as DINO's is. No equation numbers are cited: this
  file was written from public code and summaries.

Axis letters: B batch, N texts, L tokens, V views, G large crops, D width, E bottleneck, K prototypes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.clip.vit import PositionResizing, VisionTransformer
from moviola.data import tongues
from moviola.data.long_tail import pixels
from moviola.metrics.retrieval import retrieval_metrics
from moviola.parts.backbones.hf_text import HfTextConfig
from moviola.parts.distillation import (
    DinoHead,
    cosine_ramp,
    encode_crops,
    frozen_copy,
    linear_ramp,
    move_towards,
    moved_centre,
    self_distillation,
)
from moviola.parts.multilingual_clip import OPENCLIP_KEYS, MultilingualClip, MultilingualClipConfig
from moviola.training.nce import info_nce
from moviola.training.objectives import BasePairObjective
from moviola.types import Batch, Claim, Example, Needs, PictureField, TextField, Training, UsageError

_PART = 1 << 26  # logits over prototypes that exist at a time

Config = MultilingualClipConfig
KEYS = OPENCLIP_KEYS


class RsMClip(MultilingualClip):
    """The trained model: an image tower and a text tower of many languages, `moviola.types.Encoder`."""


class RsMClipObjective(BasePairObjective):
    """CLIP's loss on each large crop, plus `distillation_weight` times the self-distillation.

    Works on every model with an image tower `visual`. The batch holds `image` (B, 2, C, H, W), `local`
    (B, local_crops, C, h, w) and `text` (B, L), drawn from all columns that begin with `caption`. The
    teacher, a moving average of image tower and head, is the objective's and lies in the checkpoint.
    `local_size` None: three sevenths of the tower's size in whole patches (96 of 224). `momentum_steps`
    0: the run's own steps. A weight of 0: no teacher, no small crops, CLIP on the large crops.
    """

    centre: Tensor
    step: Tensor

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        distillation_weight: float = 1.0,
        local_crops: int = 8,
        local_size: int | None = None,
        global_area: tuple[float, float] = (0.4, 1.0),
        local_area: tuple[float, float] = (0.05, 0.4),
        global_crops_contrasted: int = 2,
        momentum: float = 0.996,
        momentum_end: float | None = None,
        momentum_steps: int = 0,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        teacher_temperature_start: float | None = None,
        teacher_warmup: int = 0,
        centre_momentum: float = 0.9,
        prototypes: int = 4096,
        hidden: int = 2048,
        bottleneck: int = 256,
        head_layers: int = 3,
        batch_norm: bool = False,
        fixed_norm: bool = True,
        position_resizing: PositionResizing = "dino",
        weight_decay: float = 0.1,
        max_logit_scale: float = 100.0,
    ) -> None:
        super().__init__(model, weight_decay=weight_decay, max_logit_scale=max_logit_scale)
        start = teacher_temperature if teacher_temperature_start is None else teacher_temperature_start
        for name, value, least, most in (
            ("momentum", momentum, 0, 1),
            ("momentum_end", momentum_end, 0, 1),
            ("centre_momentum", centre_momentum, 0, 1),
            ("student_temperature", student_temperature, 1e-4, 10),
            ("teacher_temperature", min(teacher_temperature, start), 1e-4, 10),
            ("distillation_weight", distillation_weight, 0, 1e4),
            ("global_crops_contrasted", global_crops_contrasted, 1, 2),
            ("the least of local_crops, momentum_steps and teacher_warmup",
             min(local_crops, momentum_steps, teacher_warmup), 0, 1e9),
        ):  # fmt: skip
            if value is not None and not least <= value <= most:
                raise UsageError(f"Expected {name} from {least:g} to {most:g}, got {value:g}.")
        self.distillation_weight = distillation_weight
        self.contrasted = global_crops_contrasted
        self.momentum, self.momentum_end, self.momentum_steps = momentum, momentum_end, momentum_steps
        self.student_temperature = student_temperature
        self.teacher_temperatures = (start, teacher_temperature)
        self.teacher_warmup, self.centre_momentum = teacher_warmup, centre_momentum
        self._run_steps = 0
        fields: list[PictureField | TextField] = [PictureField(count=2, area=global_area)]
        if distillation_weight:
            tower = _image_tower(model)
            if isinstance(tower, VisionTransformer):
                tower.resize_positions, tower.position_resizing = True, position_resizing
            if local_crops:
                side = _local_side(cast(Any, tower).config, local_size)
                fields.append(PictureField("local", local_crops, (side, side), local_area))
            self.teacher = frozen_copy(tower)
            self.head = DinoHead(
                cast(Any, model).dim, prototypes, hidden=hidden, bottleneck=bottleneck, layers=head_layers,
                batch_norm=batch_norm, fixed_norm=fixed_norm,
            )  # fmt: skip
            self.teacher_head = frozen_copy(self.head).train()
            self.register_buffer("centre", torch.zeros(1, prototypes))
        self.local_crops = local_crops if distillation_weight else 0
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.needs = Needs((*fields, TextField(columns=("caption*", "text"))))

    def train(self, mode: bool = True) -> RsMClipObjective:
        super().train(mode)
        if self.distillation_weight:
            self.teacher.eval()
        return self

    def outputs(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        if batch["image"].ndim != 5 or batch["image"].shape[1] != 2:
            raise UsageError(
                f"`image` holds two large crops each, (B, 2, C, H, W), got {list(batch['image'].shape)}."
            )
        tower = _image_tower(model)

        def student(pixels_BCHW: Tensor) -> Tensor:
            return tower(pixels_BCHW).vector_BD.float()

        image_BGD = encode_crops(student, batch["image"])
        text_BD = F.normalize(model.encode_text(batch["text"]).float(), dim=-1)
        made = {"image": image_BGD, "text": text_BD, "logit_scale": model.logit_scale}
        if "row" in batch:
            made["row"] = batch["row"]
        if self.distillation_weight:
            if self.local_crops:
                made["local"] = encode_crops(student, batch["local"])
            with torch.no_grad():
                made["teacher"] = encode_crops(lambda x: self.teacher(x).vector_BD.float(), batch["image"])
        return made

    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        row_B = outputs.get("row")
        if row_B is not None and len(row_B.unique()) < len(row_B):
            raise UsageError(
                "A picture comes twice in one batch; it would count against its own captions.",
                hint="Keep one row a picture, its captions side by side in the columns caption_*.",
            )
        image_BGD, scale = outputs["image"], outputs["logit_scale"].exp()
        unit_BGD = F.normalize(image_BGD[:, : self.contrasted], dim=-1)
        crops = [info_nce(image_BD, outputs["text"], scale) for image_BD in unit_BGD.unbind(1)]
        losses = {"contrastive": torch.stack(crops).mean()}
        if self.distillation_weight:
            views_BVD = torch.cat([image_BGD, outputs["local"]], 1) if self.local_crops else image_BGD
            with torch.autocast(image_BGD.device.type, enabled=False):
                distillation = self.distillation(views_BVD, outputs["teacher"])
            losses["distillation"] = self.distillation_weight * distillation
        return losses

    def distillation(self, student_BVD: Tensor, teacher_BGD: Tensor) -> Tensor:
        """The self-distillation of image vectors, large crops first; moves the centre when training.

        Logits over prototypes are made for some pictures at a time and again in the backward pass.
        """
        count, views = student_BVD.shape[:2]
        student_VBE = self.head.bottleneck(student_BVD.transpose(0, 1).flatten(0, 1)).unflatten(
            0, (views, -1)
        )
        with torch.no_grad():
            rows_ND = teacher_BGD.transpose(0, 1).flatten(0, 1)
            teacher_GBE = self.teacher_head.bottleneck(rows_ND).unflatten(0, (-1, count))
        size = max(1, _PART // (views * self.centre.shape[1]))
        parts = [slice(start, start + size) for start in range(0, count, size)]
        temperature = linear_ramp(int(self.step), self.teacher_warmup, *self.teacher_temperatures)
        given = [(student_VBE[:, part], teacher_GBE[:, part], self.centre, temperature) for part in parts]
        if len(parts) > 1 and torch.is_grad_enabled():
            made = [checkpoint(self._part, *part, use_reentrant=False) for part in given]
        else:
            made = [self._part(*part) for part in given]
        losses, means = zip(*made, strict=True)
        if self.training:  # a new tensor: what is made again later needs the old one
            self.centre = moved_centre(self.centre, torch.stack(means).sum(0) / count, self.centre_momentum)
        return torch.stack(losses).sum() / count

    def _part(
        self, student_VBE: Tensor, teacher_GBE: Tensor, centre_1K: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Some pictures' loss, and the means of the teacher's logits over their large crops, both summed."""
        with torch.no_grad():
            teacher_GBK = self.teacher_head.last_layer(teacher_GBE)
        loss_B = self_distillation(
            self.head.last_layer(student_VBE),
            teacher_GBK,
            centre_1K,
            student_temperature=self.student_temperature,
            teacher_temperature=temperature,
        )
        return loss_B.sum(), teacher_GBK.mean(0).sum(0, keepdim=True)

    def lr_factors(self, step: int, steps: int) -> Sequence[float] | None:
        self._run_steps = steps
        return None

    def momentum_at(self, step: int) -> float:
        """The teacher's momentum after a step: fixed, or half a cosine to `momentum_end`."""
        if self.momentum_end is None:
            return self.momentum
        steps = self.momentum_steps or self._run_steps
        if not steps:
            raise UsageError("momentum_end needs to know the steps.", hint="Set momentum_steps as well.")
        return cosine_ramp(step, steps, self.momentum, self.momentum_end)

    def after_step(self, model: nn.Module) -> None:
        super().after_step(model)
        if self.distillation_weight:
            momentum = self.momentum_at(int(self.step))
            move_towards(self.teacher, _image_tower(model), momentum)
            move_towards(self.teacher_head, self.head, momentum, buffers=False)
        self.step += 1


def _image_tower(model: nn.Module | None) -> nn.Module:
    tower = getattr(model, "visual", None)
    if not isinstance(tower, nn.Module):
        raise UsageError(
            f"RS-M-CLIP needs a model with an image tower named visual, got {type(model).__name__}.",
            hint="Start from a CLIP (--init builtin) or from RsMClip.",
        )
    return tower


def _local_side(config: Any, given: int | None) -> int:
    """The side of small crops in pixels: whole patches of the tower."""
    side = config.image_size if isinstance(config.image_size, int) else min(config.image_size)
    patch = getattr(config, "patch_size", side)
    side = round(side * 3 / 7) if given is None else given
    whole = max(1, round(side / patch)) * patch
    if given not in (None, whole):
        raise UsageError(
            f"local_size must be a multiple of the patch of {patch}, got {given}.", hint=f"Use {whole}."
        )
    return whole


def vit_b_32_xlm_r() -> Config:
    """The published model."""
    return Config()


TRAINING = Training(
    RsMClipObjective,
    presets={"vit-b-32-xlm-roberta-base": vit_b_32_xlm_r},
    recipe={"lr": 1e-5, "batch_size": 256, "betas": (0.9, 0.98), "warmup": 500},
)


def tiny() -> Config:
    vision = VitConfig(image_size=16, patch_size=4, width=16, layers=1, heads=2)
    text = HfTextConfig(
        vocab_size=32, width=16, layers=1, heads=2, hidden=32, positions=12, dropout=0.0, context_length=8
    )
    return Config(16, vision, text)


def example(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RsMClip(tiny()).eval()

    def run(pixels_BGCHW: Tensor, small_BVCHW: Tensor, tokens_BL: Tensor) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            objective = RsMClipObjective(model, local_crops=3, prototypes=12, hidden=8, bottleneck=4).eval()
        image_BD, text_BD = model.encode_image(pixels_BGCHW[:, 0]), model.encode_text(tokens_BL)
        losses = objective(model, {"image": pixels_BGCHW, "local": small_BVCHW, "text": tokens_BL})
        loss, scores_BB = losses["contrastive"] + losses["distillation"], model.score(text_BD, image_BD)
        return {"image": image_BD, "text": text_BD, "scores": scores_BB, "loss": loss}

    tokens_BL = torch.randint(3, 32, (4, 8), generator=generator)
    tokens_BL[1:3, 5:] = 1
    inputs = {
        "pixels_BGCHW": torch.randn(4, 2, 3, 16, 16, generator=generator),
        "small_BVCHW": torch.randn(4, 3, 3, 8, 8, generator=generator),
        "tokens_BL": tokens_BL,
    }
    shapes = {"image": (4, 16), "text": (4, 16), "scores": (4, 4), "loss": ()}
    return Example(run, inputs, shapes, model, (*inputs, "image", "text"), "loss")


# whether an arm has translated captions, and self-distillation
_ARMS = {"clip": (0, 0), "translations": (1, 0), "distillation": (0, 1), "rs-m-clip": (1, 1)}


def _short_run(model: CLIP, pairs: tongues.CaptionedViews, seed: int, steps: int, **options: Any) -> None:
    objective = RsMClipObjective(model, **options)
    optimizer = torch.optim.AdamW(list(objective.param_groups(model)), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    for step in range(steps):
        batch = pairs.batch(torch.randperm(len(pairs))[:64], objective.needs, seed=seed * steps + step)
        torch.stack(list(objective(model, batch).values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        objective.after_step(model)


@lru_cache(maxsize=3)
def _english_clip(seed: int) -> tuple[CLIP, tongues.TwoThings]:
    """The pictures, and the CLIP that every arm starts from: trained on their English captions alone."""
    torch.manual_seed(seed)
    vision = VitConfig(tongues.SIDE, patch_size=8, width=48, layers=2, heads=4, stem=((16, 0), (32, 0)))
    text = TextConfig(tongues.CONTEXT_LENGTH, tongues.vocabulary_size(), width=64, layers=1, heads=4)
    model, scenes = CLIP(ClipConfig(64, vision, text)), tongues.two_things(seed, 3000)
    pairs = tongues.CaptionedViews(scenes, tongues.LANGUAGES[:1])
    _short_run(model, pairs, seed, 150, distillation_weight=0.0)
    return model, scenes


def run_claim(
    arm: str, seed: int, *, steps: int = 150, gallery: int = 300, **options: Any
) -> dict[str, float]:
    """Train an English CLIP on by one arm; find new pictures by captions, and captions by them.

    Every arm contrasts the same two large crops a picture with one caption; `clip` and `distillation`
    see English captions only.
    """
    start, scenes = _english_clip(seed)
    translated, distilled = _ARMS[arm]
    model = copy.deepcopy(start)
    pairs = tongues.CaptionedViews(scenes, tongues.LANGUAGES if translated else tongues.LANGUAGES[:1])
    torch.manual_seed(seed + 1000)
    sizes = {"local_crops": 4, "local_size": 16, "prototypes": 256, "hidden": 128, "bottleneck": 64}
    options = {**sizes, "momentum": 0.99, "distillation_weight": float(distilled), **options}
    _short_run(model, pairs, seed + 1000, steps, **options)
    model.eval()
    later = tongues.two_things(seed, gallery, split=1, distinct=True)
    with torch.no_grad():
        image_MD, recalls = model.encode_image(pixels(later.pixels_NSS3)), []
        for language in tongues.LANGUAGES:
            text_ND = model.encode_text(torch.from_numpy(tongues.tokens(tongues.captions(later, language))))
            ranks = retrieval_metrics(model.score(text_ND, image_MD).numpy(), range(gallery))
            recalls.append((ranks["t2v"]["R1"] + ranks["v2t"]["R1"]) / 2)
    return {"R@1, other languages": sum(recalls[1:]) / len(recalls[1:]), "R@1, English": recalls[0]}


CLAIM = Claim(
    statement="Translated captions and self-distillation teach an English CLIP to find in other languages.",
    data="made world: 3,000 pictures of two small things, captions in English and three made languages",
    metric="R@1, other languages",
    arms=tuple(_ARMS),
    ours="rs-m-clip",
    baseline="clip",
    run=run_claim,
)
