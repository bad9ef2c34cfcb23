"""ViFi-CLIP: a CLIP fine-tuned on videos as it is, its video the mean of its frames; then prompts in it.

Nothing is added for time. Stage 1, the bridge, trains a CLIP's towers on clips by the names of their actions;
a video's vector is the mean of its frames' vectors. Stage 2 freezes the bridged model and learns a few
vectors in both towers from a few clips: in the text after the start token, in the image behind the patches,
and other ones in the blocks that follow. Any text and any picture still has a vector, so new class names,
search and indexes work.

Rasheed, Khattak, Maaz, Khan, Khan: "Fine-tuned CLIP Models are Efficient Video Learners", CVPR 2023,
arXiv 2212.03640. Official code: muzairkhattak/ViFi-CLIP (no licence found).

Symbols: the prompts at the inputs are `ctx` (text) and `visual.VPT` (image); block i, 1 <= i < depth, throws
away what the block before made of its prompts and takes its own `VPT_shallow` instead. Depth 1 prompts the
input only.

Known differences
- The house's CLIP averages NORMALISED frame vectors; here, as in the paper, they are averaged as they are and
  the mean is normalised, so a frame with a longer vector counts more. Padding of shorter clips is left out.
- Class texts are used as given in both stages; officially underscores become spaces in stage 2 alone, and
  the zero-shot path has the bare name where training has "a photo of a NAME.".
- A text that begins with the words whose place the prompts took has them replaced; any other gets the prompts
  inserted after its start token, which for "NAME." is the official "X ... X NAME.". `words=True` gives the
  prompts the words' place by the official rule, at most four. The context is `n_text` tokens shorter.
- Prompts on one side alone are possible, and none is 0; officially there is always one in the text.
- The authors' files lack the table of tokens, which never trains: `from_official` takes it from the CLIP that
  they started from. They round all VPT (not `ctx`) to half precision when they run; it is done at loading.
- The table of tokens does not train, as officially (class texts are looked up once). `use="text"` and
  `"image"` leave the temperature, `"both"` trains it, as officially.
- BatchNorm of a convolutional stem, which no published CLIP has, keeps its statistics where the image tower
  is frozen.
- The official script begins again at epoch 0 when it resumes after the first; the house's loop goes on.

Axis letters: B clips, T frames, N texts, C classes (channels in pixels), L tokens, n prompt tokens, D width,
E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from moviola.clip.config import TextConfig, VitConfig, vit_b_16
from moviola.clip.formats.common import scalar_logit_scale
from moviola.clip.keys import Keys, Rule, load_exact
from moviola.clip.model import CLIP
from moviola.clip.weights import strip_prefix
from moviola.data import order_clips as world
from moviola.data.reworded import harmonic_mean
from moviola.metrics.classification import topk_accuracy
from moviola.parts.prompted_clip import PromptedClip, PromptedConfig
from moviola.training.brief import fit
from moviola.training.recognition import Recognition
from moviola.types import Batch, Claim, ClipBatch, Example, Training, UsageError

TABLE = "token_embedding.weight"
MOST_WORDS = 4  # more prompts than that do not take the place of words

Config = PromptedConfig


def b_16() -> PromptedConfig:
    """The paper's model."""
    return PromptedConfig.over(vit_b_16())


class VifiClip(PromptedClip):
    """A CLIP whose video is the mean of its frames, with or without prompts. Implements `Encoder`, separable.

    Without prompts its weights are a CLIP's (`to_clip`), and the vector of a picture or text is that CLIP's.
    """

    @classmethod
    def from_official(
        cls, state: Mapping[str, Tensor], base: CLIP | None = None, *, place: Sequence[int] = ()
    ) -> VifiClip:
        """The authors' checkpoint of either stage, and the CLIP it began with, for its table of tokens.

        What it holds of its class names is dropped: any other ones do as well.
        """
        if base is None:
            raise UsageError(
                "The authors' files of ViFi-CLIP lack the table of tokens, which their CLIP has.",
                hint="Give it as base: moviola.load(FILE, base='ViT-B-16.pt').",
            )
        ours = scalar_logit_scale(KEYS.from_official(strip_prefix(dict(state), "module.")))
        ours = {name: (t.half() if "VPT" in name else t).float() for name, t in ours.items()}
        deep = [name.startswith("visual.") for name in ours if name.endswith("VPT_shallow")]
        n_vision, n_text = (len(ours.get(name, ())) for name in ("visual.VPT", "ctx"))
        config = PromptedConfig.over(
            base.config,
            n_vision=n_vision,
            n_text=n_text,
            depth_vision=sum(deep) + (n_vision > 0),
            depth_text=len(deep) - sum(deep) + (n_text > 0),
            place=tuple(place),
        )
        made = cls(config)
        table = base.token_embedding.weight.detach()
        load_exact(made, {TABLE: table, **ours}, source="ViFi-CLIP checkpoint")
        return made.eval()

    def encode_video(self, batch: ClipBatch) -> Tensor:
        """The mean of the frames' vectors as they are: ClipBatch of any T -> video_BE, not normalised."""
        shape = batch.frames_BTCHW.shape
        if len(shape) != 5 or not shape[1]:
            raise UsageError(
                f"Clips are (B, T, 3, H, W) with one frame or more, got {tuple(shape)}.",
                hint="A picture is a clip of one frame, or goes to encode_image.",
            )
        frames_BTE = self.encode_frames(batch)
        weight_BT1 = batch.mask_BT.to(frames_BTE.dtype).unsqueeze(-1)
        return (frames_BTE * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1).clamp_min(1)


KEYS = Keys(
    Rule("ctx", "prompt_learner.ctx"),
    Rule("visual.{rest}", "image_encoder.{rest}"),
    Rule("logit_scale", "logit_scale"),
    Rule("{rest}", "text_encoder.{rest}"),
    ignore=[
        f"prompt_learner.{name}" for name in ("token_prefix", "token_suffix", "complete_text_embeddings")
    ],
)
"""The authors' files have no table of tokens, but vectors of their own class names, which are not read."""


class VifiRecognition(Recognition):
    """Either stage of the paper's training, on the texts of the classes.

    stage     `bridge`: the towers that `use` names. `prompt`: the prompts, all else frozen
    n_*, depth_*  the new prompts of a model that has none; a depth of None is all blocks
    words     they take the place of the first words of the class texts and start as these, where all texts
              have the same ones and `n_text` is at most 4; else random ones are inserted before the words
    prompt_lr_scale  the rate of prompts, as a factor of the run's
    """

    def __init__(
        self,
        model: VifiClip,
        tokens_CL: Tensor,
        *,
        stage: Literal["bridge", "prompt"] = "bridge",
        use: Literal["both", "image", "text"] = "both",
        n_vision: int = 10,
        n_text: int = 10,
        depth_vision: int | None = None,
        depth_text: int | None = None,
        words: bool = True,
        prompt_lr_scale: float = 1000.0,
        **options: Any,
    ) -> None:
        if stage not in ("bridge", "prompt") or use not in ("both", "image", "text"):
            raise UsageError(f"stage is bridge or prompt, use both, image or text; got {stage!r}, {use!r}.")
        if len(tokens_CL.unique(dim=0)) < len(tokens_CL):
            raise UsageError("Two classes have the same text.", hint="Give each class its own name.")
        if stage == "bridge" and model.prompted:
            raise UsageError(
                "This model has prompts, the bridge comes before them.", hint="Set stage=prompt."
            )
        if stage == "prompt" and not model.prompted:
            first_Cn = tokens_CL[:, 1 : 1 + n_text]
            shared = words and n_text <= MOST_WORDS and bool((first_Cn == first_Cn[0]).all())
            model.add_prompts(
                n_vision=n_vision,
                n_text=n_text,
                depth_vision=depth_vision,
                depth_text=depth_text,
                place=tuple(first_Cn[0].tolist()) if shared else (),
            )
        scales = {"ctx": prompt_lr_scale, "VPT": prompt_lr_scale}
        super().__init__(model, tokens_CL, lr_scales=scales, **options)
        self.frozen_text = True
        for name, parameter in model.named_parameters():
            image, prompt = name.startswith("visual."), name == "ctx" or "VPT" in name
            if stage == "prompt":
                trains = prompt
            elif use == "both":
                trains = name != TABLE
            else:
                trains = image if use == "image" else not image and name not in (TABLE, "logit_scale")
            trains &= parameter.requires_grad  # of what the option `train` chose
            parameter.requires_grad_(trains)
            self.frozen_text &= image or name == "logit_scale" or not trains


RECOGNITION = Training(
    VifiRecognition,
    start=lambda module: module if isinstance(module, VifiClip) else VifiClip.from_clip(cast(CLIP, module)),
    presets={"b-16": b_16},
    recipe={
        "lr": 8e-6,
        "batch_size": 256,
        "epochs": 10,
        "betas": (0.9, 0.98),
        "eps": 1e-8,
        "lr_floor": 0.01,
        "template": "a photo of a {}.",
        "frames": 16,
    },
)
"""The bridge on Kinetics-400. The paper's few shots: `stage=prompt`, 50 epochs (prompts at 8e-3)."""


def example(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=3, heads=2)
    text = TextConfig(context_length=12, vocab_size=32, width=16, layers=2, heads=2)
    tokens_CL = torch.zeros(5, 12, dtype=torch.int64)
    tokens_CL[:, :6] = torch.tensor([[30, 4, 5, n, n + 7, 31] for n in range(1, 6)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VifiClip(PromptedConfig(16, vision, text)).eval()
        options: Any = {"stage": "prompt", "n_vision": 3, "n_text": 2, "mixup": 0, "cutmix": 0}
        objective = VifiRecognition(model, tokens_CL, **options)

    def run(frames_BTCHW: Tensor, label_B: Tensor) -> dict[str, Tensor]:
        clip = world.clip_batch(frames_BTCHW)
        text_CE, video_BE = model.encode_text(tokens_CL), model.encode_video(clip)
        logits_BC = model.score(text_CE, video_BE).T
        loss = objective(model, {"clip": clip, "label": label_B})["class"]
        return {"text": text_CE, "video": video_BE, "logits": logits_BC, "loss": loss}

    inputs = {
        "frames_BTCHW": torch.randn(4, 3, 3, 16, 16, generator=generator),
        "label_B": torch.randint(5, (4,), generator=generator),
    }
    shapes = {"text": (5, 16), "video": (4, 16), "logits": (4, 5), "loss": ()}
    return Example(run, inputs, shapes, model, ("frames_BTCHW", "label_B", "video", "logits"), "loss")


# --------------------------------------------------------------------------------------------------
# The claim
# --------------------------------------------------------------------------------------------------

_COLOURS, _SHAPES = (world.SEEN[kind]["train"] for kind in ("colours", "shapes"))
_THINGS = [f"{colour} {shape}" for colour in _COLOURS for shape in _SHAPES]
_CALLED = dict(zip(_SHAPES, ("moves", "grows", "comes", "shrinks"), strict=True))  # in no caption of a frame
_BASE = np.array([n for n in range(16) if (n // 4 + n % 4) % 2 == 0])  # as on a chess board
_NEW = np.setdiff1d(np.arange(16), _BASE)
_HAZE = (0.35, 0.45)  # what is left of a pixel's value from -1 to 1, and what is added


class _OnFrames(VifiRecognition):
    """For clips in memory, without mixing."""

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return super().forward(model, {**batch, "clip": world.clip_batch(batch["frames"])})


@lru_cache(maxsize=2)
def _clips(seed: int, count: int) -> dict[str, Tensor]:
    """Clips in haze of four frames, which thing each shows and which action."""
    made = world.order_clips(seed, count, frames=4)
    return {
        "frames": made.pixels() * _HAZE[0] + _HAZE[1],
        "thing": torch.tensor([_THINGS.index(thing) for thing in made.things]),
        "action": torch.from_numpy(made.label_N),
    }


def _texts(classes_C: np.ndarray) -> Tensor:
    """tokens_CL: "a red grows", where the CLIP learned "a red triangle at the top left"."""
    names = [_THINGS[n].split() for n in classes_C]
    return world.tokens([f"a {colour} {_CALLED[shape]}" for colour, shape in names])


def _of(clips: Mapping[str, Tensor], classes_C: np.ndarray, shots: int | None = None) -> dict[str, Tensor]:
    """Clips of some things, the first `shots` of each, labelled along `classes_C`."""
    rows = torch.cat([torch.nonzero(clips["thing"] == int(n))[:shots, 0] for n in classes_C])
    label_N = torch.searchsorted(torch.from_numpy(classes_C), clips["thing"][rows])
    return {"frames": clips["frames"][rows], "label": label_N}


def _fit(
    model: VifiClip, tokens_CL: Tensor, data: Mapping[str, Tensor], seed: int, steps: int, **options: Any
) -> None:
    torch.manual_seed(seed)
    objective = _OnFrames(model, tokens_CL, prompt_lr_scale=1, mixup=0, cutmix=0, **options)
    fit(model, objective, data, steps=steps, batch=24, lr=1e-2 if model.prompted else 6e-4, seed=seed)


@torch.inference_mode()
def _measure(model: VifiClip, clips: Mapping[str, Tensor]) -> dict[str, float]:
    parts = [model.encode_video(world.clip_batch(part)) for part in clips["frames"].split(100)]
    seen = {**clips, "frames": torch.cat(parts)}
    figures = {}
    for name, classes_C in (("base", _BASE), ("new", _NEW)):
        test = _of(seen, classes_C)
        scores_NC = model.score(model.encode_text(_texts(classes_C)), test["frames"]).T
        figures[name] = topk_accuracy(scores_NC.numpy(), test["label"].numpy(), (1,))["top1"]
    scores_NC = model.score(model.encode_text(world.tokens(world.ACTIONS)), seen["frames"]).T
    kinds_NC, label_N = scores_NC.unflatten(1, (-1, 2)).logsumexp(-1), clips["action"].numpy()
    return {
        "harmonic mean": harmonic_mean(figures["base"], figures["new"]),
        **figures,
        "pair accuracy": world.pair_accuracy(scores_NC, label_N),
        "kind of action, top-1": topk_accuracy(kinds_NC.numpy(), label_N // 2, (1,))["top1"],
    }


def run_claim(
    arm: str,
    seed: int,
    *,
    start: int = 300,
    steps: int = 100,
    prompt_steps: int = 60,
    clips: int = 600,
    shots: int = 4,
) -> dict[str, float]:
    """Learn half of the things from clips; name these and the others, in haze and by new words.

    "prompts" learn from `shots` clips of each NEW thing, so their "new" is a few-shot figure. "eight actions"
    is the control: told by order alone, which of a pair stays at chance, though which pair it is is learned.
    """
    train, test = _clips(seed, clips), _clips(seed + 100, clips)
    start_clip = world.image_clip(seed, steps=start)
    with torch.random.fork_rng(devices=[]):
        model = VifiClip.from_clip(start_clip)
        if arm == "eight actions":
            data = {"frames": train["frames"], "label": train["action"]}
            _fit(model, world.tokens(world.ACTIONS), data, seed, steps)
        elif arm in ("image", "text", "both", "both, then prompts"):
            _fit(model, _texts(_BASE), _of(train, _BASE), seed, steps, use=arm.split(",")[0])
        if arm.endswith("prompts"):
            few = _of(train, _NEW, shots)
            _fit(model, _texts(_NEW), few, seed, prompt_steps, stage="prompt", n_vision=4, n_text=4)
    return _measure(model, test)


CLAIM = Claim(
    statement="A CLIP trained on videos in both towers names learned and new classes better than in one.",
    data="moving things in haze, their shapes called by words that the CLIP never met; half of them new",
    metric="harmonic mean",
    arms=("zero-shot", "image", "text", "both", "prompts", "both, then prompts", "eight actions"),
    ours="both",
    baseline="image",
    run=run_claim,
)
