"""GOPro: prompts made for each picture from its own style and content, and held still under augmentation.

CoOp learns a few context vectors before the class name, the same for all pictures, and fits them to the
classes and the looks it saw. GOPro moves the context by what the frozen image tower itself sees: in every
layer the mean and deviation of the tokens (the style) and their mean (the content) are projected to the text
tower's width, and a learned mixture of the layers is added to each context vector. Two self-supervised terms
keep this honest: a picture and its two augmentations must give the same text vectors, and a small projector
must tell a picture's view from those of other pictures (SimCLR).

Singha, Jha, Banerjee: "GOPro: Generate and Optimize Prompts in CLIP using Self-Supervised Learning", BMVC
2023, arXiv 2308.11605. Official code: mainaksingha01/GOPro (MIT).

Symbols: the context v is `ctx`; mu and sigma of a layer are in `statistics`; F_s and F_c are the layers of
`style` and `content`; rho mixes the layers; the image projector is `simproj`. Loss: CE + MSE(text(x),
text(moco)) + MSE(text(x), text(augmix)) + 0.1 SimCLR. Equation numbers are not cited: this file was written
from the official code.

Known differences
- Views are made from the picture. Officially they are made from pixels that are normalised already, as if
  they were not, and normalised once more, and all AugMix views of a batch are of its first picture.
- SimCLR's term, as published, trains `simproj` alone, which prediction does not use: it changes no prompt.
- `rho`'s bias adds one number to every channel of a context token, which the layer norms take out again, and
  `simproj`'s bias is undone by its BatchNorm: both are kept as they were loaded, and not trained.
- The official `meta_net` is used nowhere and left out on loading, as are the embeddings of the class prompts,
  which are made anew for any names. CLIP's own tensors are not stored.
- The official sizes, 12 layers of 768 to 512, are ViT-B/16's, whose text tower and joint space are both 512
  wide. Here what is added to tokens is as wide as the text tower, and `simproj` as the joint space.
- Context words are counted in tokens, officially in words. Both are 4 for "a photo of a".
- BatchNorm and SimCLR see the batch of all processes; officially BatchNorm sees each process's part.
- At prediction the views are left out: officially they are made and their results thrown away.

Axis letters: B pictures, C classes or channels, H height, W width, L tokens of a picture or text, P first
tokens of a prompt, Y layers of the image tower, V width of the image tower, D width of the text tower,
E embedding width, K context vectors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.config import ClipConfig, TextConfig, VitConfig, build_config
from moviola.clip.foreign_tokenizer import AnyTokenizer
from moviola.clip.keys import Keys, Rule
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.clip.weights import strip_prefix
from moviola.data import two_manners as world
from moviola.parts.adapted import BASE, Adapted
from moviola.parts.prompting import check_same_base, class_prompts, places, promptable, tokenizer_of
from moviola.parts.shared_prefix import MOST_TEXTS, encode_with_beginnings
from moviola.training.brief import fit
from moviola.training.distinct import Distinct
from moviola.training.objectives import BasePairObjective
from moviola.training.schedule import warmup_cosine
from moviola.training.two_views import sim_clr
from moviola.types import (
    Adaptation,
    Batch,
    CheckpointError,
    Claim,
    Example,
    LabelField,
    Needs,
    PictureField,
    UsageError,
    ViewField,
)


@dataclass(frozen=True)
class Config:
    """The sizes of the model inside, and the context; the defaults are those of ViT-B/16.

    ctx_init  the phrase of `n_ctx` tokens whose embeddings the context starts from; "": random vectors
    epsilon   added to the sum of squares under the deviation's root
    """

    layers: int = 12
    vision_width: int = 768
    text_width: int = 512
    embed_dim: int = 512
    n_ctx: int = 4
    ctx_init: str = "a photo of a"
    epsilon: float = 2.3e-8

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class GoPro(Adapted):
    """A frozen CLIP with a vision transformer, and prompts made for each picture.

    tokens_CL  the prompts of its classes (`class_prompts`); the words in the context's places start it
    """

    adaptation = "classifier"
    most_texts = MOST_TEXTS  # that run through the text tower at a time
    tokens_CL: Tensor

    def __init__(self, base: nn.Module, config: Config, tokens_CL: Tensor) -> None:
        fitting = config_for(base, n_ctx=config.n_ctx, ctx_init=config.ctx_init, epsilon=config.epsilon)
        if config != fitting:
            raise CheckpointError(
                f"These prompts were made for a CLIP of other sizes: {config}. This one needs {fitting}.",
                hint="Use the model that they were trained on.",
            )
        super().__init__(base)
        self.config = config
        table = self.clip.token_embedding.weight
        self.register_buffer("tokens_CL", tokens_CL.to(table.device), persistent=False)
        words_K = places(tokens_CL, config.n_ctx).to(table.device)
        made_KD = table[words_K] if config.ctx_init else 0.02 * torch.randn(config.n_ctx, config.text_width)
        self.ctx = nn.Parameter(made_KD.detach().clone())
        self.style, self.content = (
            nn.ModuleList(nn.Linear(config.vision_width, config.text_width) for _ in range(config.layers))
            for _ in range(2)
        )
        self.rho = nn.Linear(config.layers, 1)
        project, norm = nn.Linear(config.embed_dim, config.embed_dim), nn.BatchNorm1d(config.embed_dim)
        self.simproj = nn.Sequential(OrderedDict(linear=project, batchnorm=norm))
        for useless in (self.rho.bias, project.bias):
            useless.requires_grad_(False)

    @classmethod
    def from_base(cls, base: Model, config: Mapping[str, Any], classes: Sequence[str]) -> Self:
        made = build_config(Config, config)
        with torch.random.fork_rng(devices=[]):
            return cls(base.module, made, prompts(tokenizer_of(base), classes, made)).to(base.device)

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], base: Model, classes: Sequence[str]) -> Self:
        """A checkpoint of mainaksingha01/GOPro on the CLIP it was trained on, for any classes."""
        ours = KEYS.from_official(strip_prefix(dict(state), "module."))
        own = {name: tensor.float() for name, tensor in ours.items() if not name.startswith(BASE)}
        if "ctx" not in own:
            raise CheckpointError("The checkpoint has no prompt_learner.ctx: it is not GOPro's.")
        config = config_for(base.module, n_ctx=len(own["ctx"]), ctx_init="")
        made = cls.from_base(base, config.to_json(), classes)
        made.load_own(own, source="GOPro checkpoint")
        carried = {n.removeprefix(BASE): tensor for n, tensor in ours.items() if n.startswith(BASE)}
        check_same_base(base, carried, source="GOPro checkpoint")
        return made.eval()

    def set_classes(self, tokenizer: AnyTokenizer, classes: Sequence[str]) -> None:
        """Other class names for the same prompts: nothing that was learned changes."""
        self.tokens_CL = prompts(tokenizer, classes, self.config).to(self.tokens_CL.device)

    @property
    def clip(self) -> CLIP:
        return cast(CLIP, self.base)

    # ------------------------------------------------------------------------------------ pictures

    @torch.no_grad()
    def look(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The frozen image tower: unit image_BE, and layers_YBLV, every block's output with all tokens."""
        out = self.clip.visual(pixels_BCHW, taps=range(self.config.layers))
        layers_YBLV = torch.stack([out.layers[n] for n in range(self.config.layers)])
        return F.normalize(out.vector_BD.float(), dim=-1), layers_YBLV

    def statistics(self, layers_YBLV: Tensor) -> tuple[Tensor, Tensor]:
        """What the projectors are given of each layer: (mu + sigma) / 2 and mu over the tokens, YBV each."""
        layers_YBLV = layers_YBLV.float()
        count = layers_YBLV.shape[2]
        mean_YBV = layers_YBLV.mean(2)
        square_YBV = (layers_YBLV - mean_YBV.unsqueeze(2)).square().sum(2)
        sigma_YBV = ((square_YBV + self.config.epsilon) / count).sqrt()
        return (mean_YBV + sigma_YBV) / 2, mean_YBV

    def project(self, layers_YBLV: Tensor) -> tuple[Tensor, Tensor]:
        """style_BYD and content_BYD."""
        style_BYD, content_BYD = (
            torch.stack([f(x) for f, x in zip(layers, x_YBV.to(self.ctx.dtype), strict=True)], 1)
            for layers, x_YBV in zip((self.style, self.content), self.statistics(layers_YBLV), strict=True)
        )
        return style_BYD, content_BYD

    def context(self, layers_YBLV: Tensor) -> Tensor:
        """The context vectors of each picture, all moved by the same vector: ctx_BKD."""
        style_BYD, content_BYD = self.project(layers_YBLV)
        shift_BD = self.rho(((style_BYD + content_BYD) / 2).transpose(1, 2)).squeeze(-1)
        return self.ctx + shift_BD.unsqueeze(1)

    # ----------------------------------------------------------------------------------- classifier

    def texts(self, ctx_BKD: Tensor) -> Tensor:
        """Unit vectors of every class behind every context: text_BCE."""
        opening_D = self.clip.token_embedding(self.tokens_CL[0, 0])  # the start token, alike in every prompt
        start_BPD = torch.cat([opening_D.expand(len(ctx_BKD), 1, -1).to(ctx_BKD.dtype), ctx_BKD], 1)
        text_BCE = encode_with_beginnings(self.clip, start_BPD, self.tokens_CL, most=self.most_texts)
        return F.normalize(text_BCE.float(), dim=-1)

    def compare(self, image_BE: Tensor, text_BCE: Tensor) -> Tensor:
        """Logits of unit vectors: exp(logit scale) times the cosine with the picture's own texts."""
        return self.clip.logit_scale.exp() * torch.einsum("be,bce->bc", image_BE, text_BCE)

    def classify_image(self, pixels_BCHW: Tensor) -> Tensor:
        image_BE, layers_YBLV = self.look(pixels_BCHW)
        return self.compare(image_BE, self.texts(self.context(layers_YBLV)))


def config_for(base: nn.Module, **own: Any) -> Config:
    """The configuration that fits a CLIP with a vision transformer; `own`: what the CLIP does not settle."""
    clip, visual = promptable(base)
    sizes = visual.config.layers, visual.config.width, clip.config.text.width, clip.config.embed_dim
    return Config(*sizes, **own)


def prompts(tokenizer: AnyTokenizer, classes: Sequence[str], config: Config) -> Tensor:
    """tokens_CL of class names. `UsageError` as in `class_prompts`, and for a phrase not of n_ctx tokens."""
    words = len(tokenizer.encode(config.ctx_init.replace("_", " ")))
    if config.ctx_init and words != config.n_ctx:
        raise UsageError(
            f"The phrase {config.ctx_init!r} has {words} tokens, n_ctx is {config.n_ctx}.",
            hint=f'Give n_ctx={words}, or ctx_init="" to start from random vectors.',
        )
    return class_prompts(tokenizer, classes, ctx_init=config.ctx_init, n_ctx=config.n_ctx)


def start(model: Model, classes: Sequence[str], *, ctx_init: str = "a photo of a", n_ctx: int = 4) -> GoPro:
    """New prompts for the classes; the context starts from the embeddings of a phrase, or at random."""
    config = config_for(model.module, n_ctx=n_ctx, ctx_init=ctx_init)
    return GoPro(model.module, config, prompts(tokenizer_of(model), classes, config)).to(model.device)


# --------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------


class GoProObjective(BasePairObjective):
    """GOPro's loss for batches of labelled pictures and their views.

    consistency   weight of the distances between the texts of a picture and of its views; 0: none
    simclr        weight of SimCLR's loss, at `temperature`; 0: none
    warmup_share  first part of the run, at 1e-5 / 2e-3 of the learning rate; then half a cosine, by steps
    weight_decay  of all that trains
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        consistency: float = 1.0,
        simclr: float = 0.1,
        temperature: float = 0.1,
        warmup_share: float = 1 / 50,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__(model, weight_decay=weight_decay)
        if min(consistency, simclr) < 0 or not temperature > 0 or not 0 <= warmup_share < 1:
            raise UsageError(
                "consistency and simclr must not be negative, temperature above 0 and warmup_share from 0 to "
                f"below 1, got {consistency}, {simclr}, {temperature} and {warmup_share}."
            )
        self.consistency, self.simclr, self.temperature = consistency, simclr, temperature
        self.warmup_share = warmup_share
        asked = {"moco": consistency or simclr, "augmix": consistency}
        self.views = tuple(name for name, weight in asked.items() if weight)
        made = (ViewField(name, cast(Any, name)) for name in self.views)
        self.needs = Needs((PictureField(), LabelField(), *made))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Logits, and of each row the distances between its texts and its views'; all views run together."""
        prompted = cast(GoPro, model)
        label_B = batch["label"]
        count, classes = len(label_B), len(prompted.tokens_CL)
        if int(label_B.min()) < 0 or int(label_B.max()) >= classes:
            raise UsageError(
                f"Labels must be class numbers in 0..{classes - 1}, got {int(label_B.min())}.."
                f"{int(label_B.max())}."
            )
        image_NE, layers_YNLV = prompted.look(torch.cat([batch["image"], *(batch[v] for v in self.views)]))
        told = 1 + len(self.views) if self.consistency else 1
        text_NCE = prompted.texts(prompted.context(layers_YNLV[:, : told * count]))
        text_BCE, *others = text_NCE.split(count)
        made = {"label": label_B, "logits": prompted.compare(image_NE[:count], text_BCE)}
        made |= dict(zip(("image", *self.views), image_NE.split(count), strict=True))
        for name, other_BCE in zip(self.views, others):
            made[f"{name}_gap"] = (text_BCE - other_BCE).square().mean((1, 2))
        return made

    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses = {"classes": F.cross_entropy(outputs["logits"].float(), outputs["label"])}
        if self.consistency:
            losses |= {name: self.consistency * outputs[f"{name}_gap"].mean() for name in self.views}
        if self.simclr:
            if len(outputs["label"]) < 2:
                raise UsageError(
                    "SimCLR and BatchNorm compare pictures of a batch: at least 2 are needed, got 1.",
                    hint="Raise the batch size (--batch-size 4), or train with simclr=0.",
                )
            project = cast(GoPro, model).simproj
            image_BE, moco_BE = project(outputs["image"]), project(outputs["moco"])
            losses["simclr"] = self.simclr * sim_clr(image_BE, moco_BE, self.temperature)
        return losses

    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        trained = [p for p in model.parameters() if p.requires_grad]
        return [{"params": trained, "weight_decay": self.weight_decay}]

    def lr_factors(self, step: int, steps: int) -> Sequence[float]:
        if step < (warmup := round(self.warmup_share * steps)):
            return [1e-5 / 2e-3]
        return [warmup_cosine(step - warmup, steps=steps - warmup, warmup=0)]

    def after_step(self, model: nn.Module) -> None:
        """The temperature is the frozen model's."""


ADAPTATION = Adaptation(
    start=start,
    objective=GoProObjective,
    recipe={"optimizer": "sgd", "lr": 2e-3, "momentum": 0.9, "clip_grad": 1e9, "batch_size": 4, "epochs": 50},
)

KEYS = Keys(
    Rule("ctx", "prompt_learner.ctx"),
    Rule("style.{n}.{part}", "prompt_learner.style.linear.{n}.{part}"),
    Rule("content.{n}.{part}", "prompt_learner.content.linear.{n}.{part}"),
    Rule("rho.{part}", "prompt_learner.rho.{part}"),
    Rule("simproj.{rest}", "simproj.{rest}"),
    Rule("base.visual.{rest}", "image_encoder.{rest}"),
    Rule("base.logit_scale", "logit_scale"),
    Rule("base.{rest}", "text_encoder.{rest}"),
    ignore=("prompt_learner.meta_net.{rest}", "prompt_learner.token_prefix", "prompt_learner.token_suffix"),
)


def example(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    tokens_CL = torch.tensor([[1, 2, 3, 4, 5, name, 6, 31] for name in (7, 8, 9)])
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2)
    text = TextConfig(context_length=12, vocab_size=32, width=8, layers=2, heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = CLIP(ClipConfig(12, vision, text))
        made = GoPro(base, config_for(base), tokens_CL)
    objective = GoProObjective()

    def run(**batch: Tensor) -> dict[str, Tensor]:
        losses = objective(made.train(), batch)
        logits_BC = made.eval().classify_image(batch["image"])
        return {"logits": logits_BC, "loss": torch.stack(list(losses.values())).sum()}

    pixels = {name: torch.randn(4, 3, 16, 16, generator=generator) for name in ("image", "moco", "augmix")}
    inputs = pixels | {"label": torch.tensor([0, 1, 2, 1])}
    return Example(run, inputs, {"logits": (4, 3), "loss": ()}, made, (*inputs, "logits"), "loss")


@lru_cache(maxsize=1)
def _started(seed: int, steps: int) -> tuple[CLIP, dict[str, Tensor]]:
    """The CLIP that all arms adapt, and the task's pictures with their views."""
    model, made = world.small_clip(seed), world.pictures(seed, 8000, "any", split=0)
    data = {"image": made.images_NCSS, "text": world.told(made, seed, manner=0.7)}
    fit(model, Distinct(), data, steps=steps, batch=96, lr=3e-3, seed=seed)
    return model, world.task(seed)


def run_claim(arm: str, seed: int, *, start: int = 500, steps: int = 200) -> dict[str, float]:
    """Adapt by one arm to 20 classes in one light; name these and 20 new ones in the other light."""
    clip, task = _started(seed, start)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens_CL = world.prompts(world.FORMS[0], world.BASE)
        made = GoPro(deepcopy(clip), config_for(clip, n_ctx=3, ctx_init="picture with a"), tokens_CL)
    if arm in ("zero-shot", "static prompts"):  # without projections the context is the same for all
        for p in (*made.style.parameters(), *made.content.parameters(), *made.rho.parameters()):
            nn.init.zeros_(p).requires_grad_(False)
    if arm != "zero-shot":
        objective = GoProObjective() if arm == "gopro" else GoProObjective(consistency=0, simclr=0)
        fit(made, objective, task, steps=steps, batch=16, lr=5e-3, seed=seed)

    def classify(tokens_CL: Tensor, images_NCSS: Tensor) -> Tensor:
        made.tokens_CL = tokens_CL
        return made.eval().classify_image(images_NCSS)

    figures = world.measure(classify, seed, light="turned")
    return figures | {"task's light": world.measure(classify, seed, light="bound")["harmonic mean"]}


CLAIM = Claim(
    statement="Prompts made for each picture name old and new classes where no static prompt fits all.",
    data="still lifes in two manners whose words for shapes differ; in testing the light is turned",
    metric="harmonic mean",
    arms=("zero-shot", "static prompts", "gopro, no consistency", "gopro"),
    ours="gopro",
    baseline="static prompts",
    run=run_claim,
)
