"""X-Pool: pool the frames of a video for the sentence it is compared with.

A sentence describes a part of a video, so the mean over its frames dilutes the one frame that
matters. X-Pool lets the sentence attend to the frames: one cross-attention block, whose query is the
text and whose keys and values are the frames, gives every video another vector for every text. Frames
are encoded by CLIP one by one; nothing says in which order they come.

Gorti, Vouitsis, Ma, Golestan, Volkovs, Garg, Yu: "X-Pool: Cross-Modal Language-Video Attention for
Text-Video Retrieval", CVPR 2022, arXiv 2203.15086. Official code: layer6ai-labs/xpool.

Symbols: Q_t, K_v, V_v are q_NHK, k_MTHK, v_MTHK; z_{v|t} is the output of `Pooler`; s(t, v) is the cosine.

Known differences
- Ranking without the N x M x D tensor: `score` computes the same cosines through
  `parts.pooling.pooler_scores`; `plain_score` is the written-out form, used whenever gradients or
  dropout are on.
- A zero vector has similarity 0; the official code divides by its norm and gives NaN.
- The official code moves all evaluation to the CPU; here it runs where the model is, in blocks.
- The official repository runs on OpenAI's CLIP or on transformers' (`--huggingface`); `KEYS` and
  `KEYS_HF` read checkpoints of both kinds.
- The shortlist vector (`pool`), the mean of the normalised frames, is ours: the paper has none.
- Equation numbers are not cited: this file was written from the official code, not from the paper.

Axis letters: B batch, N texts, M videos, T frames, D width, H heads, K width of one head, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.formats import hf
from moviola.clip.formats.openai import infer_config
from moviola.clip.keys import Keys, Rule, load_exact
from moviola.clip.model import CLIP, mean_of_frames
from moviola.data.planted import planted_frames
from moviola.metrics.retrieval import retrieval_metrics
from moviola.parts.pooling import (
    PoolerWeights,
    baseline_pool,
    check_pooling_inputs,
    cosine_scores,
    frame_weights,
    pooler_scores,
)
from moviola.training.objectives import BasePairObjective
from moviola.types import (
    Batch,
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


@dataclass(frozen=True)
class XPoolConfig:
    """CLIP and the pooler on top of it; the width is CLIP's `embed_dim`."""

    clip: ClipConfig = field(default_factory=ClipConfig)
    heads: int = 1
    dropout: float = 0.3
    frames: int = 12

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> XPoolConfig:
        return cls(**{**data, "clip": ClipConfig.from_json(data["clip"])})


Config = XPoolConfig


def msrvtt_9k() -> XPoolConfig:
    """The paper's model for MSR-VTT (9k split) and LSMDC."""
    return XPoolConfig()


def msvd() -> XPoolConfig:
    """The paper's model for MSVD and MSR-VTT's 7k split: more dropout."""
    return XPoolConfig(dropout=0.4)


class CrossAttention(nn.Module):
    """Every text attends to the frames of every video, scaled dot products, softmax over frames."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise UsageError(f"The width must divide by the heads, got width {dim} and {heads} heads.")
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, text_ND: Tensor, frames_MTD: Tensor, mask_MT: Tensor | None = None) -> Tensor:
        q_NHK = self.q_proj(text_ND).unflatten(-1, (self.heads, -1))
        k_MTHK = self.k_proj(frames_MTD).unflatten(-1, (self.heads, -1))
        v_MTHK = self.v_proj(frames_MTD).unflatten(-1, (self.heads, -1))
        logits_MNHT = torch.einsum("nhk,mthk->mnht", q_NHK, k_MTHK) / math.sqrt(q_NHK.shape[-1])
        if mask_MT is not None:
            logits_MNHT = logits_MNHT.masked_fill(~mask_MT[:, None, None], -math.inf)
        attended_MNHK = torch.einsum("mnht,mthk->mnhk", logits_MNHT.softmax(-1), v_MTHK)
        return self.out_proj(attended_MNHK.flatten(2))


class Pooler(nn.Module):
    """One vector per video and text: text_ND, frames_MTD -> pooled_MND.

    One LayerNorm is shared by texts and frames. There is no residual from either into the result.
    All linear maps start as the identity, so training starts from plain dot-product attention.
    """

    def __init__(self, dim: int, heads: int = 1, dropout: float = 0.3) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(dim, heads)
        self.linear_proj = nn.Linear(dim, dim)
        self.layer_norm1 = nn.LayerNorm(dim)
        self.layer_norm2 = nn.LayerNorm(dim)
        self.layer_norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.eye_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, text_ND: Tensor, frames_MTD: Tensor, mask_MT: Tensor | None = None) -> Tensor:
        check_pooling_inputs(text_ND, frames_MTD, mask_MT)
        if mask_MT is not None:  # a masked frame may hold anything, NaN included
            frames_MTD = frames_MTD.masked_fill(~mask_MT.unsqueeze(-1), 0)
        text_ND, frames_MTD = self.layer_norm1(text_ND), self.layer_norm1(frames_MTD)
        a_MND = self.layer_norm2(self.cross_attn(text_ND, frames_MTD, mask_MT))
        return self.layer_norm3(a_MND + self.dropout(self.linear_proj(a_MND)))

    def weights(self) -> PoolerWeights:
        """The same parts for the exact fast ranking."""
        c = self.cross_attn
        return PoolerWeights(
            self.layer_norm1, c.q_proj, c.k_proj, c.v_proj, c.out_proj,
            self.layer_norm2, self.linear_proj, self.layer_norm3, c.heads,
        )  # fmt: skip


class XPool(nn.Module):
    """CLIP with a text-conditioned pooler. Implements `moviola.types.Encoder`, not separable.

    `encode_video` gives raw frame vectors (B, T, D): the video's vector exists only per text.
    """

    has_text = True
    separable = False
    adaptation: Literal["none", "embedding", "classifier"] = "none"

    def __init__(self, config: XPoolConfig) -> None:
        super().__init__()
        self.config = config
        self.clip = CLIP(config.clip)
        self.pool_frames = Pooler(config.clip.embed_dim, config.heads, config.dropout)
        self.frame_spec = FrameSpec(config.frames, "middle", "repeat-last")

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> XPool:
        """Untrained, from the JSON form of its configuration."""
        return cls(XPoolConfig.from_json(data))

    @classmethod
    def from_clip(cls, clip: CLIP) -> XPool:
        """The start of the paper's training: this CLIP, and a pooler that is still the identity."""
        made = cls(XPoolConfig(clip.config))
        made.clip.load_state_dict(clip.state_dict())
        return made.eval()

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor]) -> XPool:
        """The authors' checkpoint; sizes are read off its tensors, heads of 64 as in OpenAI's CLIPs."""
        ours = keys_for(state).from_official(state)
        towers = {k.removeprefix("clip."): v for k, v in ours.items() if k.startswith("clip.")}
        made = cls(XPoolConfig(infer_config(towers, source="X-Pool checkpoint")))
        load_exact(made, ours, source="X-Pool checkpoint")
        return made.eval()

    @property
    def dim(self) -> int:
        return self.clip.dim

    @property
    def context_length(self) -> int:
        return self.clip.context_length

    @property
    def logit_scale(self) -> Tensor:
        """CLIP's own learned log temperature, which X-Pool goes on training."""
        return self.clip.logit_scale

    def encode_text(self, tokens_NL: Tensor) -> Tensor:
        return self.clip.encode_text(tokens_NL)

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        return self.clip.encode_image(pixels_BCHW)

    def encode_video(self, batch: ClipBatch) -> Tensor:
        """ClipBatch -> frames_BTD, raw: the pooler wants neither text nor frames normalised."""
        return self.clip.encode_frames(batch)

    def pool(self, video: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """frames_BTD -> the mean of the normalised frames, for shortlists without a query."""
        return mean_of_frames(video, mask_BT)

    def score(self, text_ND: Tensor, video: Tensor, mask_MT: Tensor | None = None) -> Tensor:
        """Cosine with the video pooled for each text, times the logit scale: (N, M).

        Exact and fast while ranking; written out where gradients or dropout are wanted.
        """
        if self.training or torch.is_grad_enabled():
            return self.plain_score(text_ND, video, mask_MT)
        return self.logit_scale.exp() * pooler_scores(text_ND, video, self.pool_frames.weights(), mask_MT)

    def plain_score(self, text_ND: Tensor, frames_MTD: Tensor, mask_MT: Tensor | None = None) -> Tensor:
        """`score` through the M x N x D pooled vectors."""
        return self.logit_scale.exp() * cosine_scores(text_ND, self.pool_frames(text_ND, frames_MTD, mask_MT))

    def attention(self, text_ND: Tensor, frames_MTD: Tensor, mask_MT: Tensor | None = None) -> Tensor:
        """Which frames each text looks at: (N, M, T), rows sum to 1."""
        return frame_weights(text_ND, frames_MTD, self.pool_frames.weights(), mask_MT)


def pair_loss(scores_BB: Tensor) -> Tensor:
    """Symmetric cross-entropy; text i belongs to video i. Scores carry the logit scale already."""
    if scores_BB.ndim != 2 or scores_BB.shape[0] != scores_BB.shape[1]:
        raise UsageError(
            f"The loss needs one text per video, got scores of {tuple(scores_BB.shape)}.",
            hint="Give every clip of the batch exactly one caption.",
        )
    target_B = torch.arange(len(scores_BB), device=scores_BB.device)
    return (F.cross_entropy(scores_BB, target_B) + F.cross_entropy(scores_BB.T, target_B)) / 2


class XPoolObjective(BasePairObjective):
    """The paper's training of a whole `XPool`: the pooler at 1e-5 (3e-5 on MSR-VTT 9k), CLIP at a tenth."""

    needs: Needs = Needs((VideoField(), TextField()))

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        clip_lr_scale: float = 0.1,
        weight_decay: float = 0.2,
        max_logit_scale: float = 100.0,
    ) -> None:
        super().__init__(model, weight_decay=weight_decay, max_logit_scale=max_logit_scale)
        self.clip_lr_scale = clip_lr_scale

    def outputs(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        return {
            "text": model.encode_text(batch["text"]),
            "frames": model.encode_video(batch["clip"]),
            "mask": batch["clip"].mask_BT,
        }

    def loss(self, model: Any, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scores_BB = model.plain_score(outputs["text"], outputs["frames"], outputs["mask"])
        return {"contrastive": pair_loss(scores_BB)}

    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        old = [p for name, p in named if "clip." in name]
        new = [p for name, p in named if "clip." not in name]
        yield {"params": old, "lr_scale": self.clip_lr_scale, "weight_decay": self.weight_decay}
        yield {"params": new, "weight_decay": self.weight_decay}


TRAINING = Training(
    XPoolObjective,
    start=lambda module: module if isinstance(module, XPool) else XPool.from_clip(cast(CLIP, module)),
    presets={"msrvtt-9k": msrvtt_9k, "msvd": msvd},
    recipe={"lr": 1e-5, "batch_size": 32, "betas": (0.9, 0.999)},
)


_POOLER = Keys(
    Rule("pool_frames.cross_attn.{rest}", "pool_frames.cross_attn.{rest}"),
    Rule("pool_frames.linear_proj.{rest}", "pool_frames.linear_proj.{rest}"),
    Rule("pool_frames.layer_norm{n}.{rest}", "pool_frames.layer_norm{n}.{rest}"),
)
KEYS = _POOLER + Keys(Rule("clip.{rest}", "clip.{rest}"))
"""On OpenAI's CLIP, whose names are the house's own."""
KEYS_HF = _POOLER + hf.KEYS.under("clip.")
"""On transformers' CLIP (`--huggingface`)."""


def keys_for(state: Mapping[str, Tensor]) -> Keys:
    """The table that reads this official state dict: by the names of its CLIP."""
    return KEYS_HF if any(name.startswith("clip.text_model.") for name in state) else KEYS


def tiny() -> XPoolConfig:
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2)
    text = TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2)
    return XPoolConfig(ClipConfig(16, vision, text), heads=2, frames=3)


def example(seed: int) -> Example:
    generator, objective = torch.Generator().manual_seed(seed), XPoolObjective()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = XPool(tiny()).eval()

    def run(frames_BTCHW: Tensor, tokens_BL: Tensor) -> dict[str, Tensor]:
        mask_BT = torch.ones(frames_BTCHW.shape[:2], dtype=torch.bool)
        batch = ClipBatch(frames_BTCHW, torch.arange(3.0).expand(mask_BT.shape), mask_BT)
        text_BD, frames_BTD = model.encode_text(tokens_BL), model.encode_video(batch)
        return {
            "text": text_BD,
            "frames": frames_BTD,
            "shortlist": model.pool(frames_BTD, mask_BT),
            "scores": model.score(text_BD, frames_BTD, mask_BT),
            "loss": objective(model, {"clip": batch, "text": tokens_BL})["contrastive"],
        }

    tokens_BL = torch.randint(1, 30, (4, 8), generator=generator)
    tokens_BL[:, -1] = 31
    inputs = {"frames_BTCHW": torch.randn(4, 3, 3, 16, 16, generator=generator), "tokens_BL": tokens_BL}
    shapes = {"text": (4, 16), "frames": (4, 3, 16), "shortlist": (4, 16), "scores": (4, 4), "loss": ()}
    batched = ("frames_BTCHW", "tokens_BL", "text", "frames", "shortlist")
    return Example(run, inputs, shapes, model, batched, "loss")


class _Towers(nn.Module):
    """The claim's trained parts: a linear tower per modality, a logit scale, and the arm's pooling."""

    def __init__(self, dim: int, arm: Any) -> None:
        super().__init__()
        self.arm = arm
        self.text, self.frame = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.pool_frames = Pooler(dim, dropout=0.1) if arm == "xpool" else None
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def cosines(self, text_ND: Tensor, frames_MTD: Tensor) -> Tensor:
        text_ND, frames_MTD = self.text(text_ND), self.frame(frames_MTD)
        if self.pool_frames is not None:
            return cosine_scores(text_ND, self.pool_frames(text_ND, frames_MTD))
        return cosine_scores(text_ND, baseline_pool(self.arm, text_ND, frames_MTD))


def run_claim(
    arm: str, seed: int, *, steps: int = 300, batch: int = 64, gallery: int = 500
) -> dict[str, float]:
    """Train one arm on planted frames; measure it on videos and captions it has never met."""
    train, test = planted_frames(seed, 4000), planted_frames(seed, gallery, split=1)
    torch.manual_seed(seed)
    towers = _Towers(train.text_ND.shape[1], arm)
    optimizer = torch.optim.AdamW(towers.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(train.text_ND), (batch,))
        cosines_BB = towers.cosines(train.text_ND[rows], train.frames_NTD[rows])
        pair_loss(towers.logit_scale.exp() * cosines_BB).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        XPoolObjective().after_step(towers)
    towers.eval()
    with torch.no_grad():
        cosines_NM = towers.cosines(test.text_ND, test.frames_NTD).numpy()
        metrics = retrieval_metrics(cosines_NM, range(gallery))
        figures = {"t2v R@1": metrics["t2v"]["R1"], "v2t R@1": metrics["v2t"]["R1"]}
        if towers.pool_frames is not None:
            features = towers.text(test.text_ND), towers.frame(test.frames_NTD)
            peak_N = frame_weights(*features, towers.pool_frames.weights()).diagonal().argmax(0)
            hit_N = test.planted_NT[torch.arange(gallery), peak_N]
            figures["attention peak on planted frame, %"] = 100 * hit_N.double().mean().item()
    return figures


CLAIM = Claim(
    statement="Pooling frames for the caption finds the video better than the mean of its frames.",
    data="planted frames (tensors): 12 frames, 1 or 2 match the caption; 500 new videos to rank",
    metric="t2v R@1",
    arms=("avg", "topk", "attention", "xpool"),
    ours="xpool",
    baseline="avg",
    run=run_claim,
    cached={arm: f"planted-frames/linear-towers/300x64/{arm}" for arm in ("avg", "topk", "attention")},
)
