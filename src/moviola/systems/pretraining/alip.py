"""ALIP: let bad pairs weigh less, told by a second, synthetic caption.

The text found beside a picture on the web is often about something else. ALIP gives each picture a
second text made by a captioner and trains on both, each sample and each pair weighted by gates. If raw
text and caption agree better than they do on average, all weights are one. If not, the sample weighs
less, and each of its pairs weighs by how well that text fits the picture, compared with the average.
The averages run along during training, so nothing needs to be labelled or fixed beforehand. What is
trained is a plain CLIP, its text tower used for both texts.

Yang, Deng, An, Li, Feng, Guo, Yang, Liu: "ALIP: Adaptive Language-Image Pre-training with Synthetic
Caption", ICCV 2023, arXiv 2308.08428. Official code: deepglint/ALIP.

Symbols: the language consistency gate W^s is `Gates.sample_N`, the description consistency gates W^r
(raw) and W^c (caption) are `raw_N` and `caption_N`; the running means H are `averages_3`, in the order
language, raw, caption; gamma is `exponent`.

Known differences
- Rows without a synthetic caption are allowed: they count as raw pairs of weight one, stay out of the
  language and caption averages, and their empty captions are no negatives. The official code needs one
  for every picture.
- A similarity that is not a number enters no average; officially it would spoil the average for good.
- Outside training the averages stay as they are.
- Our batch is global and its gradient full; the official code gathers without gradient, so each process
  differentiates its own rows: after averaging the same up to the number of processes. `--local-loss`,
  whose logits do not fit its global weights, is not offered.
- A batch of one is an error: nothing is contrasted in it.
- The official schedule is OneCycle, a cosine up over a tenth of the steps and a cosine down; the run's
  own schedule warms up linearly.
- Equation numbers are not cited: this file was written from the official code, not from the paper.

Axis letters: N rows of a batch, D width, B pictures, L tokens of a text, 2L of both, 3 the averages.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.config import ClipConfig, TextConfig, VitConfig, rn50, vit_b_16, vit_b_32
from moviola.clip.formats.common import scalar_logit_scale
from moviola.clip.formats.openai import infer_config
from moviola.clip.formats.openclip import plain_names
from moviola.clip.keys import Keys, Rule
from moviola.clip.model import CLIP
from moviola.clip.native import assign
from moviola.data import still_lifes as world
from moviola.metrics.retrieval import retrieval_metrics
from moviola.training.brief import fit
from moviola.training.nce import paired_cross_entropy
from moviola.training.objectives import BasePairObjective, Contrastive, encode_pairs
from moviola.training.unit_vectors import check_unit_rows
from moviola.types import Batch, Claim, Example, Needs, PictureField, TextField, Training, UsageError

Config = ClipConfig
EXPONENT, RATE, START = 2.0, 0.01, 1.0


def alip(clip: ClipConfig) -> ClipConfig:
    """A published size with GELU, as OpenCLIP and so ALIP has it."""
    return replace(clip, activation="gelu")


class Alip(CLIP):
    """A plain CLIP that reads the authors' checkpoints and their batches of two texts."""

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> Alip:
        """Untrained, from the JSON form of its configuration."""
        return cls(ClipConfig.from_json(data))

    @classmethod
    def from_clip(cls, clip: CLIP) -> Alip:
        """A copy of this CLIP."""
        made = cls(clip.config)
        made.load_state_dict(clip.state_dict())
        return made.eval()

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor]) -> Alip:
        """A checkpoint of deepglint/ALIP; its shape follows from the tensors, heads are 64 wide.

        The names are OpenCLIP's, so nothing in the file tells ALIP, whose activation is GELU, from
        OpenAI's models, which have QuickGELU: call this where you know that it is ALIP's.
        """
        ours = scalar_logit_scale(KEYS.from_official(plain_names(state)))
        config = infer_config(ours, source="The ALIP checkpoint")
        with torch.device("meta"):
            made = cls(alip(config))
        assign(made, ours, source="ALIP checkpoint")
        return made.eval()

    def encode_triples(self, pixels_BCHW: Tensor, tokens_B2L: Tensor) -> dict[str, Tensor]:
        """The official forward: pictures, and raw tokens and caption tokens side by side.

        Unit rows `image`, `text` and `caption`, and the factor `scale` (not its logarithm).
        """
        length = self.context_length
        if tokens_B2L.ndim != 2 or tokens_B2L.shape[1] != 2 * length:
            raise UsageError(
                f"Expected raw and caption tokens side by side, (B, {2 * length}), got "
                f"{tuple(tokens_B2L.shape)}."
            )
        texts = {"text": tokens_B2L[:, :length], "caption": tokens_B2L[:, length:]}
        made = encode_triples(self, {"image": pixels_BCHW, **texts})
        return {name: made[name] for name in ("image", "text", "caption")} | {"scale": self.logit_scale.exp()}


def encode_triples(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Unit rows of `image`, `text` and `caption` by a CLIP, and its logit scale as stored."""
    caption_BD = F.normalize(cast(Any, model).encode_text(batch["caption"]).float(), dim=-1)
    return encode_pairs(model, batch) | {"caption": caption_BD}


# --------------------------------------------------------------------------------------------------
# The gates
# --------------------------------------------------------------------------------------------------


class Gates(NamedTuple):
    """The weight of every sample (at most 1) and of its raw and its caption pair. No gradient."""

    sample_N: Tensor
    raw_N: Tensor
    caption_N: Tensor


def similarities(image_ND: Tensor, raw_ND: Tensor, caption_ND: Tensor) -> Tensor:
    """Cosines of raw text and caption, raw text and picture, caption and picture: (3, N), no gradient."""
    check_unit_rows(image_ND, raw_ND, caption_ND)
    pairs = (raw_ND, caption_ND), (raw_ND, image_ND), (caption_ND, image_ND)
    return torch.stack([(a_ND.detach() * b_ND.detach()).sum(-1) for a_ND, b_ND in pairs])


def moved(
    averages_3: Tensor, cosine_3N: Tensor, *, rate: float = RATE, has_caption_N: Tensor | None = None
) -> Tensor:
    """The running averages after this batch: each goes the share `rate` of the way to the batch's mean.

    What is not a number is left out of the mean; an average that nothing enters stays as it is.
    """
    kept_3N = cosine_3N.isfinite()
    if has_caption_N is not None:
        kept_3N[0::2] &= has_caption_N  # language and caption
    mean_3 = cosine_3N.masked_fill(~kept_3N, 0).sum(1) / kept_3N.sum(1).clamp(min=1)
    return torch.where(kept_3N.any(1), rate * mean_3 + (1 - rate) * averages_3, averages_3.to(mean_3))


def gates(
    cosine_3N: Tensor,
    averages_3: Tensor,
    *,
    exponent: float = EXPONENT,
    has_caption_N: Tensor | None = None,
) -> Gates:
    """The three weights of every row. A row without a caption is a raw pair of weight one."""
    weight_3N = (exponent * (cosine_3N - averages_3.to(cosine_3N)[:, None])).exp()
    consistent_N = weight_3N[0] >= 1
    if has_caption_N is not None:
        consistent_N = consistent_N | ~has_caption_N
    return Gates(*weight_3N.masked_fill(consistent_N, 1.0))


def inspect(
    image_ND: Tensor,
    raw_ND: Tensor,
    caption_ND: Tensor,
    averages_3: Tensor | None = None,
    *,
    exponent: float = EXPONENT,
) -> Gates:
    """The weights that ALIP gives these rows, to look at: the lowest are the pairs to distrust.

    Any trained CLIP's unit rows will do. `averages_3` are a run's (`AlipObjective.averages_3`); None
    takes the means of these rows.
    """
    cosine_3N = similarities(image_ND, raw_ND, caption_ND)
    return gates(cosine_3N, cosine_3N.nanmean(1) if averages_3 is None else averages_3, exponent=exponent)


def adaptive_loss(image_ND: Tensor, text_ND: Tensor, scale: Tensor | float, weight_N: Tensor) -> Tensor:
    """The mean over rows of weight times the mean of both directions' cross-entropies."""
    check_unit_rows(image_ND, text_ND)
    if weight_N.shape != (len(image_ND),):
        raise UsageError(
            f"Expected one weight per row, {len(image_ND)}, got {tuple(weight_N.shape)}.",
            hint="Weights of the global batch fit only the global batch's vectors.",
        )
    images_N, texts_N = paired_cross_entropy(image_ND, text_ND, scale)
    return ((images_N + texts_N) / 2 * weight_N.detach()).mean()


def alip_step(
    image_ND: Tensor,
    raw_ND: Tensor,
    caption_ND: Tensor,
    scale: Tensor | float,
    averages_3: Tensor,
    *,
    rate: float = RATE,
    exponent: float = EXPONENT,
    has_caption_N: Tensor | None = None,
) -> tuple[dict[str, Tensor], Gates, Tensor]:
    """Losses `raw` and `caption` (their sum is ALIP's), the gates, and the averages after this batch.

    Unit rows; `scale` is the factor of the logits; the averages are moved before they are used
    (`rate=0` leaves them). `has_caption_N` False: a raw pair alone.
    """
    check_unit_rows(image_ND, raw_ND, caption_ND, least=2)
    cosine_3N = similarities(image_ND, raw_ND, caption_ND)
    averages_3 = moved(averages_3, cosine_3N, rate=rate, has_caption_N=has_caption_N)
    made = gates(cosine_3N, averages_3, exponent=exponent, has_caption_N=has_caption_N)
    losses = {"raw": adaptive_loss(image_ND, raw_ND, scale, made.sample_N * made.raw_N)}
    weight_N, kept = made.sample_N * made.caption_N, torch.arange(len(image_ND), device=image_ND.device)
    if has_caption_N is not None:
        kept = kept[has_caption_N]
    if len(kept):  # both losses divide by the number of all rows
        share, pairs = len(kept) / len(image_ND), (image_ND[kept], caption_ND[kept])
        losses["caption"] = share * adaptive_loss(*pairs, scale, weight_N[kept])
    else:
        losses["caption"] = 0 * losses["raw"]
    return losses, made, averages_3


class AlipObjective(BasePairObjective):
    """ALIP's loss for any CLIP; needs synthetic captions beside the raw texts.

    rate, start and exponent are those of the running averages and the gates.
    With an exponent of 0 all weights are one: the plain sum of two contrastive losses.
    `averages_3` (language, raw, caption) is running state and lies in the checkpoint.
    """

    averages_3: Tensor
    needs: Needs = Needs(
        (
            PictureField(),
            TextField(),
            TextField("caption", ("synthetic_caption", "synthetic"), optional=True),
        )
    )

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        rate: float = RATE,
        start: float = START,
        exponent: float = EXPONENT,
        weight_decay: float = 0.2,
        max_logit_scale: float = 100.0,
    ) -> None:
        super().__init__(model, weight_decay=weight_decay, max_logit_scale=max_logit_scale)
        if not 0 < rate <= 1 or not -1 <= start <= 1 or exponent < 0:
            raise UsageError(
                f"rate must lie above 0 and be at most 1, start from -1 to 1, exponent not negative, got "
                f"{rate}, {start} and {exponent}."
            )
        self.rate, self.exponent, self._warned = rate, exponent, False
        self.register_buffer("averages_3", torch.full((3,), float(start)))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if "caption" not in batch:
            raise UsageError(
                "ALIP needs a second, synthetic caption of each picture, and the batch has none.",
                hint="Add a column `synthetic_caption` to the table.",
            )
        mask_B = batch.get("caption_mask")
        if mask_B is None:
            mask_B = torch.ones(len(batch["caption"]), dtype=torch.bool, device=batch["caption"].device)
        return encode_triples(model, batch) | {"has_caption": mask_B.bool()}

    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self._warned and not bool(outputs["has_caption"].any()):
            self._warned = True
            warnings.warn(
                "No row of a batch has a synthetic caption: without them ALIP is CLIP on the raw texts. "
                "Add a column `synthetic_caption`, or name yours: --column synthetic_caption=NAME.",
                stacklevel=2,
            )
        losses, _, averages_3 = alip_step(
            outputs["image"],
            outputs["text"],
            outputs["caption"],
            outputs["logit_scale"].exp(),
            self.averages_3,
            rate=self.rate if self.training else 0.0,
            exponent=self.exponent,
            has_caption_N=outputs["has_caption"],
        )
        if self.training:
            self.averages_3.copy_(averages_3)
        return losses

    def inspect(self, model: nn.Module, batch: Batch) -> Gates:
        """The weights of a batch by the averages of now; nothing changes."""
        with torch.no_grad():
            made = self.outputs(model, batch)
            cosine_3N = similarities(made["image"], made["text"], made["caption"])
        has_caption_N = made["has_caption"]
        return gates(cosine_3N, self.averages_3, exponent=self.exponent, has_caption_N=has_caption_N)

    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        """One group: the authors let everything decay."""
        trained = [p for p in model.parameters() if p.requires_grad]
        return [{"params": trained, "weight_decay": self.weight_decay}]


TRAINING = Training(
    AlipObjective,
    presets={
        "vit-b-32": lambda: alip(vit_b_32()),
        "vit-b-16": lambda: alip(vit_b_16()),
        "rn50": lambda: alip(rn50()),
    },
    recipe={"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8, "clip_grad": 1.0, "batch_size": 4096},
)

KEYS = Keys(Rule("{rest}", "{rest}"), ignore=("attn_mask",))
"""OpenCLIP's names, which are the house's."""


def tiny() -> ClipConfig:
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2)
    text = TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2)
    return ClipConfig(16, vision, text, "gelu")


def example(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Alip(tiny()).eval()

    def run(pixels_BCHW: Tensor, tokens_B2L: Tensor) -> dict[str, Tensor]:
        made = model.encode_triples(pixels_BCHW, tokens_B2L)
        vectors = made["image"], made["text"], made["caption"]
        averages_3 = torch.full((3,), START)
        losses, weights, _ = alip_step(*vectors, made["scale"], averages_3)
        return {
            **{name: made[name] for name in ("image", "text", "caption")},
            "weight_sample": weights.sample_N,
            "loss": losses["raw"] + losses["caption"],
        }

    tokens_B2L = torch.randint(1, 30, (4, 16), generator=generator)
    tokens_B2L[:, 7::8] = 31
    inputs = {"pixels_BCHW": torch.randn(4, 3, 16, 16, generator=generator), "tokens_B2L": tokens_B2L}
    shapes = {"image": (4, 16), "text": (4, 16), "caption": (4, 16), "weight_sample": (4,), "loss": ()}
    return Example(run, inputs, shapes, model, (*inputs, "image", "text", "caption"), "loss")


def run_claim(
    arm: str, seed: int, *, shuffled: float = 0.5, steps: int = 300, batch: int = 96, pairs: int = 12_000
) -> dict[str, float]:
    """Train one arm where half of the raw texts belong to other pictures; retrieve new ones by "a red star
    on gravel".

    Every thing on every ground once, 480 pictures. The gates are those of 1000 training rows by the arm's
    model, with their own means as averages where the arm has none.
    """
    scenes = world.still_lifes(seed, pairs)
    texts = world.triples(scenes, seed, shuffled=shuffled)
    data = {"image": scenes.images_NCSS, "text": texts.raw_NL, "caption": texts.caption_NL}
    model = world.small_clip(seed)
    gated = AlipObjective(exponent=EXPONENT if arm == "alip" else 0.0, weight_decay=0.1)
    objective = Contrastive() if arm == "clip on raw" else gated
    fit(model, objective, data, steps=steps, batch=batch, lr=2e-3, seed=seed)

    new = world.one_of_each(seed)
    ground_only = [True, False, False, False]
    things = zip(new.thing_N.tolist(), new.faint_NF.tolist(), strict=True)
    queries_NL = world.tokens([world.caption(thing, faint, ground_only) for thing, faint in things])
    with torch.no_grad():
        scores_NM = model.score(model.encode_text(queries_NL), model.encode_image(new.images_NCSS))
        made = encode_triples(model, {name: tensor[:1000] for name, tensor in data.items()})
    averages_3 = gated.averages_3 if arm == "alip" else None
    weights = inspect(made["image"], made["text"], made["caption"], averages_3)
    bad_N = torch.from_numpy(texts.shuffled_N[:1000])
    found = retrieval_metrics(scores_NM.numpy(), range(len(new)))
    figures = {"t2i R@1": found["t2v"]["R1"], "i2t R@1": found["v2t"]["R1"]}
    for name, weight_N in (("W_s", weights.sample_N), ("W_s W_r", weights.sample_N * weights.raw_N)):
        figures[f"{name}, shuffled"] = float(weight_N[bad_N].mean())
        figures[f"{name}, clean"] = float(weight_N[~bad_N].mean())
    return figures


CLAIM = Claim(
    statement="Weighing pairs by their agreement with a synthetic caption beats taking all pairs alike.",
    data="still lifes: 12,000 made pictures, half of the raw texts shuffled, captions one in ten wrong",
    metric="t2i R@1",
    arms=("clip on raw", "unweighted sum", "alip"),
    ours="alip",
    baseline="unweighted sum",
    run=run_claim,
)
