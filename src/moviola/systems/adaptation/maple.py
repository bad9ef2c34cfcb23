"""MaPLe: prompts in both towers of a frozen CLIP, those of the image tower made from those of the text tower.

A few vectors stand in the text where the words "a photo" stood, and as many are appended to the image's
tokens. Both are learned from a few labelled pictures, and deeper blocks get vectors of their own. The image
tower's vectors are no parameters: linear couplings make them from the text's, so both towers move together.
The result is still two towers: any text and any picture has a vector, so new class names, search and
indexes work without training again.

Khattak, Rasheed, Maaz, Khan, Khan: "MaPLe: Multi-modal Prompt Learning", CVPR 2023, arXiv 2210.03117.
Official code: muzairkhattak/multimodal-prompt-learning (MIT).

Symbols: P = `ctx` and P_i = `compound_prompts_text` (n x d_t), F = `proj` and F_i =
`compound_prompt_projections` (d_t to d_v), J = `depth`, b = `n_ctx`. Block i of either tower, 1 <= i < J,
sees P_i or F_i(P_i) in place of what the block before made of its prompts; from J on they flow.

Known differences
- Texts other than class prompts can be encoded: one that begins with the placeholder words has them replaced,
  exactly the official class prompt; any other gets the prompts inserted after its start token, so the
  context is n tokens shorter. What follows the end token is cut off (exact, the tower is causal).
- d_t and d_v come from the backbone, and all is float32; the official code halves prompts and couplings.
- Towers may differ in depth: both are prompted to the same depth, at most that of the shallower one, and
  `depth=None` takes 9 or that. The official towers are equally deep.
- A phrase starts `ctx` whatever n is; officially only for n <= 4.
- The cosine falls at every step, officially after every epoch; warm-up is a share of the steps, one epoch of
  five. Momentum 0.9 and decay 5e-4 are the defaults of the authors' framework.
- `sides`, ours, to compare with: prompts in the text tower alone (as CoOp, but deep), or in the image tower
  alone (as VPT, its vectors from the same parameters and couplings).

Axis letters: B pictures, T frames, N texts, C classes (channels in pixels_BCHW), L tokens, n prompt tokens,
D width, E embedding width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.config import ClipConfig, TextConfig, VitConfig, build_config
from moviola.clip.keys import Keys, Rule
from moviola.clip.model import CLIP, mean_of_frames
from moviola.clip.vit import VisionTransformer
from moviola.clip.weights import strip_prefix
from moviola.data import reworded as world
from moviola.parts.adapted import BASE, Adapted
from moviola.parts.prompting import (
    Sides,
    check_same_base,
    class_prompts,
    embed_with_context,
    most_depth,
    places,
    promptable,
    run_with_prompts,
    text_from_embeddings,
    tokenizer_of,
    with_places,
)
from moviola.training.brief import fit
from moviola.training.config import TrainConfig
from moviola.training.loop import train
from moviola.training.naming import Naming
from moviola.types import (
    Adaptation,
    Batch,
    CheckpointError,
    Claim,
    ClipBatch,
    Example,
    UsageError,
)

if TYPE_CHECKING:
    from moviola.clip.foreign_tokenizer import AnyTokenizer
    from moviola.clip.loaded import Model

DEPTH, LR, WARMUP_LR, PHRASE = 9, 0.0035, 1e-5, "a photo of a"


@dataclass(frozen=True)
class Config:
    """n_ctx prompt tokens (n), in the first `depth` blocks (J) of the towers that `sides` names.

    `ctx_init` is the phrase before class names, whose first n tokens give way to the prompts and start
    them; "": random vectors and no phrase. Deep prompts start from N(0, `std`).
    """

    n_ctx: int = 2
    depth: int = DEPTH
    ctx_init: str = PHRASE
    sides: Sides = "both"
    std: float = 0.02

    def __post_init__(self) -> None:
        if self.n_ctx < 1 or self.depth < 1:
            raise UsageError(
                f"n_ctx and depth must be at least 1, got {self.n_ctx} and {self.depth}.",
                hint="depth=1 prompts the first block only.",
            )
        if self.sides not in ("both", "text", "vision"):
            raise UsageError(f"sides is both, text or vision, got {self.sides!r}.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Config:
        return cast(Config, build_config(cls, data))


class Maple(Adapted):
    """A frozen CLIP with coupled prompts; `tokens_CL` are the prompts of its classes (`class_prompts`).

    `Refusal` for a base that is no CLIP with a vision transformer.
    """

    adaptation = "embedding"
    config: Config
    tokens_CL: Tensor

    def __init__(self, base: nn.Module, config: Config, tokens_CL: Tensor) -> None:
        clip, visual = promptable(base)
        super().__init__(base)
        self.config, n = config, config.n_ctx
        most = most_depth(clip, config.sides)
        if config.depth > most:
            raise UsageError(
                f"depth {config.depth} is more than the {most} blocks of the shallowest tower with prompts.",
                hint=f"Use 1 to {most}, or None for min({DEPTH}, {most}).",
            )
        table = clip.token_embedding.weight
        self.register_buffer("tokens_CL", tokens_CL.to(table.device), persistent=False)
        place_n = places(self.tokens_CL, n)
        made = config.std * torch.randn(config.depth, n, table.shape[1])
        if config.ctx_init:
            made[0] = clip.token_embedding(place_n).detach()
        self.ctx = nn.Parameter(made[0].clone())
        self.compound_prompts_text = nn.ParameterList(nn.Parameter(one.clone()) for one in made[1:])
        if config.sides != "text":
            deep, self.proj = (nn.Linear(table.shape[1], visual.config.width) for _ in range(2))
            copies = (copy.deepcopy(deep) for _ in range(config.depth - 1))
            self.compound_prompt_projections = nn.ModuleList(copies)
        self._known: tuple[Any, Tensor] | None = None

    @classmethod
    def from_base(cls, base: Model, config: Mapping[str, Any], classes: Sequence[str]) -> Self:
        made = Config.from_json(config)
        tokens_CL = class_prompts(tokenizer_of(base), classes, ctx_init=made.ctx_init, n_ctx=made.n_ctx)
        with torch.random.fork_rng(devices=[]):
            return cls(base.module, made, tokens_CL).to(base.device)

    @classmethod
    def from_official(
        cls, state: Mapping[str, Tensor], base: Model, classes: Sequence[str], *, ctx_init: str = PHRASE
    ) -> Self:
        """The authors' checkpoint on the CLIP it was trained on, for any class names.

        Its class prompts are dropped; the CLIP that it carries must be `base`.
        """
        ours = KEYS.from_official(strip_prefix(dict(state), "module."))
        own = {name: tensor.float() for name, tensor in ours.items() if not name.startswith(BASE)}
        if "ctx" not in own:
            raise CheckpointError("The MaPLe checkpoint has no prompt_learner.ctx.")
        deep = sum(name.startswith("compound_prompts_text.") for name in own)
        config = Config(n_ctx=len(own["ctx"]), depth=deep + 1, ctx_init=ctx_init)
        made = cls.from_base(base, config.to_json(), classes)
        made.load_own(own, source="MaPLe checkpoint")
        carried = {n.removeprefix(BASE): tensor for n, tensor in ours.items() if n.startswith(BASE)}
        check_same_base(base, carried, source="MaPLe checkpoint")
        return made.eval()

    def set_classes(self, tokenizer: AnyTokenizer, classes: Sequence[str]) -> None:
        """Other class names for the same prompts: nothing that was learned changes."""
        config = self.config
        tokens_CL = class_prompts(tokenizer, classes, ctx_init=config.ctx_init, n_ctx=config.n_ctx)
        self.tokens_CL = tokens_CL.to(self.tokens_CL.device)

    # -------------------------------------------------------------------------------------- prompts

    def text_prompts(self) -> list[Tensor]:
        """One (n, D) for each of the first `depth` blocks of the text tower."""
        return [self.ctx, *self.compound_prompts_text]

    def vision_prompts(self) -> list[Tensor]:
        """Those of the image tower: the text's through the couplings."""
        couplings = [self.proj, *self.compound_prompt_projections]
        return [couple(p_nD) for couple, p_nD in zip(couplings, self.text_prompts(), strict=True)]

    @property
    def context_length(self) -> int:
        """Tokens of a text: the base's without the prompts'."""
        return super().context_length - (self.config.n_ctx if self.config.sides != "vision" else 0)

    # --------------------------------------------------------------------------------------- towers

    def encode_text(self, tokens_NL: Tensor) -> Tensor:
        """tokens_NL of any texts -> text_NE, not normalised."""
        if self.config.sides == "vision" or not len(tokens_NL):
            return super().encode_text(tokens_NL)
        clip = cast(CLIP, self.base)
        tokens_NL, eot_N = with_places(clip, tokens_NL, self.tokens_CL[0, 1 : 1 + self.config.n_ctx])
        first_nD, *deep = self.text_prompts()
        return text_from_embeddings(clip, embed_with_context(clip, tokens_NL, first_nD), eot_N, deep=deep)

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """pixels_BCHW -> image_BE, not normalised. The prompts get no positions, and follow the patches."""
        if self.config.sides == "text":
            return super().encode_image(pixels_BCHW)
        visual = cast(VisionTransformer, self.base.visual)
        first_nD, *deep = self.vision_prompts()
        x_BLD = visual.embed(pixels_BCHW)
        # the norm before the blocks sees one token at a time: it may as well come before joining
        prompt_BnD = visual.ln_pre(first_nD.to(x_BLD.dtype)).expand(len(x_BLD), -1, -1)
        x_BLD = torch.cat([x_BLD, prompt_BnD], dim=1)
        x_BLD = run_with_prompts(visual.transformer, x_BLD, deep, -self.config.n_ctx)
        return visual.ln_post(x_BLD[:, 0]) @ visual.proj

    def encode_video(self, batch: ClipBatch) -> Tensor:
        frames_BTCHW = batch.frames_BTCHW
        frames_BTE = self.encode_image(frames_BTCHW.flatten(0, 1)).unflatten(0, frames_BTCHW.shape[:2])
        return mean_of_frames(frames_BTE, batch.mask_BT)

    def class_vectors(self) -> Tensor:
        """Unit vectors_CE of the classes' prompts. Without gradients they are kept until a weight changes."""
        if torch.is_grad_enabled():
            return F.normalize(self.encode_text(self.tokens_CL), dim=-1)
        prompts = self.text_prompts()
        state = (id(self.tokens_CL), *((id(p), p._version, p.device, p.dtype) for p in prompts))
        if self._known is None or self._known[0] != state:
            self._known = state, F.normalize(self.encode_text(self.tokens_CL), dim=-1)
        return self._known[1]

    def classify_image(self, pixels_BCHW: Tensor) -> Tensor:
        """exp(logit_scale) times the cosine with each class: logits_BC."""
        scale = cast(Tensor, self.base.logit_scale).exp()
        return scale * F.normalize(self.encode_image(pixels_BCHW), dim=-1) @ self.class_vectors().T


def start(
    model: Model,
    classes: Sequence[str],
    *,
    n_ctx: int = 2,
    depth: int | None = None,
    ctx_init: str = PHRASE,
    sides: Sides = "both",
) -> Maple:
    """New prompts for these classes, the model frozen inside. `depth=None`: 9, or what the towers have."""
    config = Config(n_ctx, DEPTH if depth is None else depth, ctx_init, sides)
    if depth is None:
        config = replace(config, depth=min(DEPTH, most_depth(promptable(model.module)[0], sides)))
    return Maple.from_base(model, config.to_json(), classes)


class MapleObjective(Naming):
    """Cross-entropy over the classes, each of whose prompts runs through the text tower once a step.

    The share `warmup_share` of the steps is taken at WARMUP_LR / LR times the rate; then half a cosine, begun
    with the run, leads down.
    """

    def __init__(
        self, module: nn.Module | None = None, *, weight_decay: float = 5e-4, warmup_share: float = 0.2
    ) -> None:
        super().__init__(module, weight_decay=weight_decay)
        if not 0 <= warmup_share < 1:
            raise UsageError(f"warmup_share lies from 0 to below 1, got {warmup_share}.")
        self.warmup_share = warmup_share

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return cast(Maple, model).classify_image(batch["image"])

    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        """All that trains, biases too, decays alike."""
        trained = [p for p in model.parameters() if p.requires_grad]
        return [{"params": trained, "weight_decay": self.weight_decay}]

    def lr_factors(self, step: int, steps: int) -> Sequence[float]:
        done = step / steps
        return [WARMUP_LR / LR if done < self.warmup_share else 0.5 * (1 + math.cos(math.pi * done))]

    def after_step(self, model: nn.Module) -> None:
        return  # the temperature is the base's, and frozen


_RECIPE = {"batch_size": 4, "lr": LR, "optimizer": "sgd", "momentum": 0.9, "clip_grad": math.inf}
ADAPTATION = Adaptation(start=start, objective=MapleObjective, recipe={"epochs": 5, **_RECIPE})

KEYS = Keys(
    Rule("ctx", "prompt_learner.ctx"),
    Rule("proj.{rest}", "prompt_learner.proj.{rest}"),
    Rule("compound_prompts_text.{n}", "prompt_learner.compound_prompts_text.{n}"),
    Rule("compound_prompt_projections.{rest}", "prompt_learner.compound_prompt_projections.{rest}"),
    Rule(f"{BASE}visual.{{rest}}", "image_encoder.{rest}"),
    Rule(f"{BASE}logit_scale", "logit_scale"),
    Rule(f"{BASE}{{rest}}", "text_encoder.{rest}"),
    ignore=("prompt_learner.token_prefix", "prompt_learner.token_suffix"),
)
"""The authors' files hold their CLIP too, without its table of tokens."""


def example(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=3, heads=2)
    text = TextConfig(context_length=12, vocab_size=32, width=8, layers=3, heads=2)
    tokens_CL = torch.zeros(3, 12, dtype=torch.int64)
    tokens_CL[:, :7] = torch.tensor([[30, 4, 5, 6, 4, name, 31] for name in (7, 8, 9)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Maple(CLIP(ClipConfig(16, vision, text)), Config(depth=3), tokens_CL).eval()
    objective = MapleObjective(model)

    def run(pixels_BCHW: Tensor, tokens_BL: Tensor, label_B: Tensor) -> dict[str, Tensor]:
        losses = objective(model, {"image": pixels_BCHW, "label": label_B})
        return {
            "image": model.encode_image(pixels_BCHW),
            "text": model.encode_text(tokens_BL),
            "logits": model.classify_image(pixels_BCHW),
            "loss": losses["cross-entropy"],
        }

    tokens_BL = torch.randint(1, 30, (4, 10), generator=generator)
    tokens_BL[:, 0], tokens_BL[:, -1] = 30, 31
    inputs = {
        "pixels_BCHW": torch.randn(4, 3, 16, 16, generator=generator),
        "tokens_BL": tokens_BL,
        "label_B": torch.randint(3, (4,), generator=generator),
    }
    shapes = {"image": (4, 16), "text": (4, 16), "logits": (4, 3), "loss": ()}
    return Example(run, inputs, shapes, model, (*inputs, "image", "text", "logits"), "loss")


@lru_cache(maxsize=3)
def _small_clip(seed: int, steps: int) -> CLIP:
    """A CLIP trained on clear pictures and plain names of all the things."""
    model = world.small_clip(seed)
    data = dict(zip(("image", "label"), world.pictures(seed, 100), strict=True))
    naming = Naming(tokens_FCL=torch.stack([world.prompts(form) for form in world.FORMS]))
    fit(model, naming, data, steps=steps, batch=64, lr=2e-3, seed=seed)
    return model


def _adapted(clip: CLIP, sides: Sides, seed: int, shots: int, epochs: float) -> Maple:
    """Prompts for the base classes, by the authors' recipe on a draw of hazy pictures."""
    task = world.of_classes(*world.pictures(seed, shots, hazy=True), world.BASE)
    steps = max(1, int(epochs * len(task) / ADAPTATION.recipe["batch_size"]))
    once: dict[str, Any] = {"save_every": steps, "log_every": steps, **_RECIPE}
    run = TrainConfig(steps=steps, warmup=0, seed=seed, **once)
    config = Config(depth=2, ctx_init="photo of a", sides=sides)
    with torch.random.fork_rng(devices=[]), TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        model = Maple(copy.deepcopy(clip), config, world.prompts(reworded=True)[world.BASE])
        train(model, MapleObjective(model), task, run, Path(folder))
    return model


_SIDES: dict[str, Sides] = {"text prompts": "text", "vision prompts": "vision", "maple": "both"}


def run_claim(
    arm: str, seed: int, *, start: int = 600, shots: int = 16, epochs: float = 10
) -> dict[str, float]:
    """Learn half of the things from a few hazy pictures; name these and the others."""
    with torch.random.fork_rng(devices=[]):
        model = _small_clip(seed, start)
    if arm in _SIDES:
        return world.measure(_adapted(model, _SIDES[arm], 100 + seed, shots, epochs), 200 + seed)
    return world.measure(model, 200 + seed)


CLAIM = Claim(
    statement="Coupled prompts in both towers name learned and new classes better than those of one tower.",
    data="things in haze, called by other words than those the CLIP was trained on; half of them are new",
    metric="harmonic mean",
    arms=("zero-shot", *_SIDES),
    ours="maple",
    baseline="text prompts",
    run=run_claim,
    seeds=(10, 11, 12, 13),  # the world was made while looking at others
)
