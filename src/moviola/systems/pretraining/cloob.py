"""CLOOB: contrast what a memory recalls, and leave the positive out of the denominator.

InfoNCE is content with the one feature that tells a picture from the others of its batch; features
that merely occur together with it are "explained away". CLOOB first replaces every embedding by what
a modern Hopfield network recalls from the batch, a mix of similar embeddings, which strengthens what
occurs together. Recalled embeddings are alike, so InfoNCE on them saturates; InfoLOOB, whose
denominator lacks the positive pair, does not. The trained model is used exactly like CLIP.

Fuerst, Rumetshofer, Lehner, Tran, Tang, Ramsauer, Kreil, Kopp, Klambauer, Bitto-Nemling, Hochreiter:
"CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP", NeurIPS 2022, arXiv 2110.11316.
Official code: ml-jku/cloob (MIT), Hopfield layer ml-jku/hopfield-layers.

Symbols: X, Y are image_ND, text_ND; U_x, U_y (pictures and texts recalled from the pictures) are the
first two of `Recalled`, V_y, V_x (texts and pictures recalled from the texts) the last two; tau is
1 / inv_tau. Retrieval is softmax(beta R P^T) P with unit rows.

Known differences
- The retrieval never holds an N x N matrix: it is one attention with `scale=beta`, and InfoLOOB runs
  in bands (`training.nce`). The official code masks the diagonal with -1000, here it is -inf: equal.
- A batch of one is an error; the official code breaks on it.
- Our batch is global and its gradient full; the official code gathers without gradient and lets each
  process differentiate its own rows, which after averaging is the same up to the number of processes.
- The temperature is named `logit_scale` as in CLIP, so any CLIP can be trained and exported;
  `logit_inv_tau` is the same parameter. Scores are inv_tau * cosine, the official ones 100 * cosine.
- Decay spares all vectors, scalars and position tables; officially names with bn, ln or bias.
- "InfoNCE on recalled embeddings" is the mean of the symmetric losses of (U_x, U_y) and (V_y, V_x),
  "InfoLOOB without retrieval" the sum of both directions: the official repository has no switch for them.
- Equation numbers are not cited: this file was written from the official code, not from the paper.

Axis letters: N rows of a batch, M stored patterns, D width, B pictures, L tokens.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig, rn50, vit_b_16, vit_b_32
from moviola.clip.formats.common import scalar_logit_scale
from moviola.clip.formats.openai import infer_config
from moviola.clip.keys import Keys, Rule
from moviola.clip.model import CLIP
from moviola.clip.native import assign
from moviola.clip.weights import strip_prefix
from moviola.data import still_lifes as world
from moviola.metrics.classification import topk_accuracy
from moviola.metrics.variance import components_for_variance
from moviola.training.brief import fit
from moviola.training.nce import info_nce, log_sum_exp
from moviola.training.objectives import BasePairObjective, encode_pairs
from moviola.training.repeats import text_numbers
from moviola.training.unit_vectors import check_unit_rows
from moviola.types import Batch, Claim, Example, Training, UsageError

Config = ClipConfig
INV_TAU, BETA, MOST_INV_TAU = 30.0, 8.0, 100.0


def rn101() -> ClipConfig:
    return ClipConfig(512, ResNetConfig(layers=(3, 4, 23, 3)))


def rn50x4() -> ClipConfig:
    vision = ResNetConfig(image_size=288, width=80, layers=(4, 6, 10, 6), heads=40)
    return ClipConfig(640, vision, TextConfig(width=640, heads=10))


def rn50x16() -> ClipConfig:
    vision = ResNetConfig(image_size=384, width=96, layers=(6, 8, 18, 8), heads=48)
    return ClipConfig(768, vision, TextConfig(width=768, heads=12))


class Cloob(CLIP):
    """A CLIP whose temperature starts at, and by default stays at, 1 / 30."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__(config)
        nn.init.constant_(self.logit_scale, math.log(INV_TAU))
        self.logit_scale.requires_grad_(False)

    @property
    def logit_inv_tau(self) -> Tensor:
        """The official name of `logit_scale`."""
        return self.logit_scale

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> Cloob:
        """Untrained, from the JSON form of its configuration."""
        return cls(ClipConfig.from_json(data))

    @classmethod
    def from_clip(cls, clip: CLIP) -> Cloob:
        """This CLIP's towers, at CLOOB's temperature."""
        made = cls(clip.config)
        made.load_state_dict({**clip.state_dict(), "logit_scale": made.logit_scale})
        return made.eval()

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor]) -> Cloob:
        """A checkpoint of ml-jku/cloob; widths and depths follow from the shapes, heads are 64 wide."""
        state = strip_prefix(dict(state), "module.")
        ours = scalar_logit_scale(keys_for(state).from_official(state))
        with torch.device("meta"):
            made = cls(infer_config(ours, source="The CLOOB checkpoint"))
        assign(made, ours, source="CLOOB checkpoint")
        return made.eval()


# --------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------


class Recalled(NamedTuple):
    """Unit rows: pictures and texts recalled from pictures, texts and pictures recalled from texts."""

    u_x_ND: Tensor
    u_y_ND: Tensor
    v_y_ND: Tensor
    v_x_ND: Tensor


def recall(state_ND: Tensor, stored_MD: Tensor, beta: float = BETA) -> Tensor:
    """One step of a modern Hopfield network: unit rows of softmax(beta * state . stored) stored."""
    if not beta > 0:
        raise UsageError(f"beta must be positive, got {beta}.", hint="The paper uses 8 on CC3M.")
    with torch.autocast(state_ND.device.type, enabled=False):
        stored_11MD = stored_MD[None, None]
        mixed_11ND = F.scaled_dot_product_attention(
            state_ND[None, None], stored_11MD, stored_11MD, scale=beta
        )
    # attention kernels may answer NaN with zeros: keep it, so that the training loop sees it
    nan_N1 = 0 * (state_ND.detach().sum(-1, keepdim=True) + stored_MD.detach().sum())
    return F.normalize(mixed_11ND[0, 0] + nan_N1, dim=-1)


def recall_all(image_ND: Tensor, text_ND: Tensor, beta: float = BETA) -> Recalled:
    """The four retrievals of a batch of unit rows."""
    check_unit_rows(image_ND, text_ND)
    return Recalled(
        recall(image_ND, image_ND, beta),
        recall(text_ND, image_ND, beta),
        recall(text_ND, text_ND, beta),
        recall(image_ND, text_ND, beta),
    )


def info_loob(anchor_ND: Tensor, other_ND: Tensor, inv_tau: Tensor | float) -> Tensor:
    """tau times the mean over anchors of log sum over j != i of exp(k_ij), less k_ii; k = a b^T / tau.

    One direction: rows of `anchor_ND` are the anchors. It can be negative.
    """
    check_unit_rows(anchor_ND, other_ND, least=2)
    value = float(inv_tau.detach()) if isinstance(inv_tau, Tensor) else inv_tau
    if not 0 < value <= MOST_INV_TAU * 1.001:  # exp(ln 100) is a little above 100
        raise UsageError(f"inv_tau must lie above 0 and be at most {MOST_INV_TAU:g}, got {value}.")
    others_N, _ = log_sum_exp(anchor_ND, other_ND, inv_tau, leave_out=True)
    return (others_N / inv_tau - (anchor_ND * other_ND).sum(-1)).mean()


def cloob_terms(
    image_ND: Tensor, text_ND: Tensor, *, inv_tau: Tensor | float = INV_TAU, beta: float = BETA
) -> tuple[Tensor, Tensor]:
    """InfoLOOB(U_x, U_y) and InfoLOOB(V_y, V_x)."""
    check_unit_rows(image_ND, text_ND, least=2)
    u_x, u_y, v_y, v_x = recall_all(image_ND, text_ND, beta)
    return info_loob(u_x, u_y, inv_tau), info_loob(v_y, v_x, inv_tau)


def cloob_loss(
    image_ND: Tensor, text_ND: Tensor, *, inv_tau: Tensor | float = INV_TAU, beta: float = BETA
) -> Tensor:
    """CLOOB's loss of a batch of unit rows, row i of one belonging to row i of the other."""
    image_term, text_term = cloob_terms(image_ND, text_ND, inv_tau=inv_tau, beta=beta)
    return image_term + text_term


def cosine_restarts(step: int, *, steps: int, warmup: int, cycles: int) -> float:
    """Linear warm-up, then `cycles` half cosines from 1 to 0, each starting at once at 1 again."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.0 if done >= 1 else 0.5 * (1 + math.cos(math.pi * (cycles * done % 1.0)))


class CloobObjective(BasePairObjective):
    """CLOOB's loss for any CLIP.

    beta, inv_tau      the memory's and the loss's inverse temperatures; `inv_tau=None` takes the model's
    learnable_inv_tau  train the temperature; else it is fixed and the model's is set to it
    retrieval          False: contrast the embeddings themselves
    contrast           `infoloob`, or `infonce`; without retrieval that is CLIP's loss
    cycles             as many cosines with hard restarts instead of the run's schedule, after a warm-up
                       of `warmup_share` of the steps (the authors: 10 on CC3M)

    Captions that occur twice in a batch are false negatives; they weigh more here than in CLIP, since
    the positive is not in the denominator. The first such batch gives a warning.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        beta: float = BETA,
        inv_tau: float | None = INV_TAU,
        learnable_inv_tau: bool = False,
        retrieval: bool = True,
        contrast: Literal["infoloob", "infonce"] = "infoloob",
        cycles: int = 0,
        warmup_share: float = 0.05,
        weight_decay: float = 0.1,
        max_logit_scale: float = MOST_INV_TAU,
    ) -> None:
        super().__init__(model, weight_decay=weight_decay, max_logit_scale=max_logit_scale)
        if not beta > 0 or (inv_tau is not None and not 0 < inv_tau <= MOST_INV_TAU):
            raise UsageError(
                f"beta must be positive and inv_tau above 0 and at most {MOST_INV_TAU:g}, got {beta} and "
                f"{inv_tau}."
            )
        if contrast not in ("infoloob", "infonce") or cycles < 0 or not 0 <= warmup_share < 1:
            raise UsageError(
                f"contrast is infoloob or infonce, cycles 0 or more and warmup_share from 0 to below 1, got "
                f"{contrast!r}, {cycles} and {warmup_share}."
            )
        self.beta, self.inv_tau, self.learnable_inv_tau = beta, inv_tau, learnable_inv_tau
        self.retrieval, self.contrast = retrieval, contrast
        self.cycles, self.warmup_share = cycles, warmup_share
        self._warned = False
        scale = getattr(model, "logit_scale", None)
        if isinstance(scale, nn.Parameter):
            scale.requires_grad_(learnable_inv_tau)
            if inv_tau is not None:
                nn.init.constant_(scale, math.log(inv_tau))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return encode_pairs(model, batch) | {"caption": text_numbers(batch["text"])}

    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        image_ND, text_ND = outputs["image"], outputs["text"]
        if "caption" in outputs and not self._warned:
            self._warn_of_duplicates(outputs["caption"])
        fixed = self.inv_tau is not None and not self.learnable_inv_tau
        inv_tau = self.inv_tau if fixed else outputs["logit_scale"].exp()
        assert inv_tau is not None
        check_unit_rows(image_ND, text_ND, least=2)
        u_x, u_y, v_y, v_x = image_ND, text_ND, text_ND, image_ND
        if self.retrieval:
            u_x, u_y, v_y, v_x = recall_all(image_ND, text_ND, self.beta)
        if self.contrast == "infoloob":
            return {"image": info_loob(u_x, u_y, inv_tau), "text": info_loob(v_y, v_x, inv_tau)}
        if not self.retrieval:
            return {"contrastive": info_nce(image_ND, text_ND, inv_tau)}
        return {"image": info_nce(u_x, u_y, inv_tau) / 2, "text": info_nce(v_y, v_x, inv_tau) / 2}

    def lr_factors(self, step: int, steps: int) -> Sequence[float] | None:
        if not self.cycles:
            return None
        warmup = round(self.warmup_share * steps)
        return [cosine_restarts(step, steps=steps, warmup=warmup, cycles=self.cycles)] * 2

    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        """Two groups as usual; a temperature that is fixed is in neither."""
        groups = list(super().param_groups(model))
        if not self.learnable_inv_tau:
            kept = [p for p in groups[1]["params"] if p is not getattr(model, "logit_scale", None)]
            groups[1]["params"] = kept
        return groups

    def _warn_of_duplicates(self, caption_N: Tensor) -> None:
        twice = len(caption_N) - len(caption_N.unique())
        if twice:
            self._warned = True
            warnings.warn(
                f"{twice} of the {len(caption_N)} captions of a batch repeat another one of it: false "
                "negatives, which InfoLOOB punishes harder than CLIP's loss. Remove duplicates, or give "
                "rows more captions to draw from.",
                stacklevel=2,
            )


TRAINING = Training(
    CloobObjective,
    presets={m.__name__.replace("_", "-"): m for m in (rn50, rn101, rn50x4, rn50x16, vit_b_32, vit_b_16)},
    recipe={"lr": 1e-3, "batch_size": 512, "betas": (0.9, 0.999), "eps": 1e-8, "warmup": 20_000},
)

_TOWER_AND_SCALE = Keys(Rule("logit_scale", "logit_inv_tau"), Rule("visual.{rest}", "visual.{rest}"))
KEYS = _TOWER_AND_SCALE + Keys(Rule("{rest}", "transformer.{rest}"))
"""`CLIPGeneral`: the text tower lies below `transformer.`."""
KEYS_ROOT = _TOWER_AND_SCALE + Keys(Rule("{rest}", "{rest}"))
"""The repository's class `CLIP`: the text tower at the root."""


def keys_for(state: Mapping[str, Tensor]) -> Keys:
    """The table that reads this official state dict."""
    return KEYS_ROOT if "token_embedding.weight" in state else KEYS


def tiny() -> ClipConfig:
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2)
    return ClipConfig(16, vision, TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2))


def example(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Cloob(tiny()).eval()
    objective = CloobObjective(model)

    def run(pixels_BCHW: Tensor, tokens_BL: Tensor) -> dict[str, Tensor]:
        image_BD, text_BD = model.encode_image(pixels_BCHW), model.encode_text(tokens_BL)
        losses = objective(model, {"image": pixels_BCHW, "text": tokens_BL})
        return {
            "image": image_BD,
            "text": text_BD,
            "scores": model.score(text_BD, image_BD),
            "loss": losses["image"] + losses["text"],
        }

    tokens_BL = torch.randint(1, 30, (4, 8), generator=generator)
    tokens_BL[:, -1] = 31
    inputs = {"pixels_BCHW": torch.randn(4, 3, 16, 16, generator=generator), "tokens_BL": tokens_BL}
    shapes = {"image": (4, 16), "text": (4, 16), "scores": (4, 4), "loss": ()}
    return Example(run, inputs, shapes, model, ("pixels_BCHW", "tokens_BL", "image", "text"), "loss")


_ARMS: dict[str, dict[str, Any]] = {
    "clip": {"retrieval": False, "contrast": "infonce"},
    "hopfield + infonce": {"contrast": "infonce"},
    "infoloob alone": {"retrieval": False},
    "cloob": {},
}


@lru_cache(maxsize=3)
def _started(seed: int, pairs: int, steps: int, batch: int) -> tuple[dict[str, Tensor], CLIP]:
    """Pairs, and the CLIP that all arms go on from: at random vectors every memory recalls the mean."""
    scenes = world.still_lifes(seed, pairs)
    data = {"image": scenes.images_NCSS, "text": world.captions(scenes, seed, named=0.5)}
    model = world.small_clip(seed)
    plain = CloobObjective(model, **_ARMS["clip"])
    fit(model, plain, data, steps=steps, batch=batch, lr=2e-3, seed=seed)
    return data, model


def run_claim(
    arm: str, seed: int, *, start: int = 150, steps: int = 250, batch: int = 96, pairs: int = 12_000
) -> dict[str, float]:
    """Go on training a young CLIP by one arm; name faint features of new pictures by prompt alone.

    Captions name one striking thing and half of four faint features, which occur together. All arms
    have inv_tau 30. "99 % components" are the paper's diagnostic for 1500 new pictures.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captions of so small a world repeat in every batch
        data, young = _started(seed, pairs, start, batch)
        model = copy.deepcopy(young)
        objective = CloobObjective(model, **_ARMS[arm])
        fit(model, objective, data, steps=steps, batch=batch, lr=2e-3, seed=seed + 1)

    new = world.still_lifes(seed, 1500, split=1)
    right = {}
    with torch.no_grad():
        image_ND, young_ND = (F.normalize(m.encode_image(new.images_NCSS), dim=-1) for m in (model, young))
        for name, prompts in world.prompts().items():
            scores_NC = model.score(model.encode_text(world.tokens(prompts)), image_ND).T
            right[name] = topk_accuracy(scores_NC.numpy(), new.labels[name], (1,))["top1"]
    return {
        "faint features, top-1": sum(right[name] for name in world.FAINT) / len(world.FAINT),
        "thing, top-1": right["thing"],
        "99 % components": components_for_variance(image_ND),
        "recalled": components_for_variance(recall(image_ND, image_ND)),
        "recalled at the start": components_for_variance(recall(young_ND, young_ND)),
    }


CLAIM = Claim(
    statement="Contrasting what a memory recalls teaches faint features that occur together better.",
    data="still lifes: a striking thing and four faint features that co-occur, half of them named",
    metric="faint features, top-1",
    arms=tuple(_ARMS),
    ours="cloob",
    baseline="clip",
    run=run_claim,
)
