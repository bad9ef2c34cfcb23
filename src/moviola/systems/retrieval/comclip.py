"""ComCLIP: score a picture and a sentence with the sentence's things cut out of the picture, each weighed.

One vector of a whole picture tells badly who does what. ComCLIP takes the sentence apart into entities and
relations, blacks out of the picture all but each entity (and, for a relation, all but its two entities),
encodes these sub-images by the same frozen encoder, and adds them to the picture's vector, each weighed by
how well it fits its own words. Nothing is trained. It costs an encoding per sub-image and pair, so it
compares a few pictures or ranks a shortlist anew.

Jiang, He, Xu, Wang: "ComCLIP: Training-Free Compositional Image and Text Matching", NAACL 2024, arXiv
2211.13854. Official code: eric-ai-lab/ComCLIP (MIT).

    s_k = sim(text(key_k), image(sub_k))      w_k = s_k / sum_j s_j
    v = image + sum_k w_k image(sub_k)        score = cos(text(sentence), v)

A key is "attributes name" of an entity, or a relation's verb. `scores="dot"` is the official code on CLIP's
own release (ComVG, Flickr30k): dot products and sums of vectors as they come. `scores="cosine"` is the one
on Hugging Face's (Winoground): unit vectors, similarities times the logit scale, which the ratio cancels.

Known differences
- Weights: officially the plain ratio, which explodes or turns round where similarities change sign. Here
  (`weights="guarded"`) a sub-image that does not fit its words has no weight, and where none fits the score
  is the plain cosine; both are told in notes. `weights="ratio"` is the official rule, NaN with a note where
  the sum is 0; `softmax` is another.
- Officially sub-images are pasted over one another where they are not black (8-bit grey above 0). All come
  from one picture, so the result is the union of their rectangles, whatever the order, in which colours so
  dark that their grey is 0 are made black. `overlay="mask"` keeps those colours; `overlay="grey"` does not.
- Two sub-images with the same key officially collapse into one (the later picture, the earlier place). Here
  both stay; `repeats="merge"` restores it.
- An entity without a key of attributes officially takes the previous entity's key; here its key is its name.
- Pictures are made RGB on white first, also the whole one; officially transparency is dropped.
- Whole pictures among the sub-images, and equal ones, are encoded once: the scores are the same.
- Officially rows that fail are dropped from the denominator; `pairwise_accuracy` counts them as wrong and
  says how many there are.
- Where a picture has no boxes they are found by the model's own patches (`parts.patch_regions`) instead of a
  dense captioner. The BLIP-2 and SLIP variants are not here.

Axis letters: H height, W width, K sub-images, D embedding width, N pairs, M pictures, R rows of a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from moviola.clip.keys import Keys
from moviola.data import two_things
from moviola.media import on_white
from moviola.metrics.compositional import pairwise_accuracy
from moviola.parts.patch_regions import PatchRegions
from moviola.parts.regions import Box, Regions, box_mask, by_words, grey, keep
from moviola.parts.sentence_parser import Parse
from moviola.types import Claim, Example, Refusal, UsageError

if TYPE_CHECKING:
    from moviola.clip.loaded import Model


@dataclass(frozen=True)
class ComClipConfig:
    """How sub-images are made, weighed and added.

    scores       `cosine` of unit vectors, or `dot` products of vectors as they come
    weights      `guarded` or `ratio` of the scores, or their `softmax` at `temperature`
    overlay      `mask` keeps every pixel inside a box, `grey` loses those whose grey is 0
    relation     a relation has a sub-image if both its ends were `parsed`, or only if both were `matched`
                 with something in the picture; else it has the whole picture
    repeats      `keep` sub-images whose key occurs already, or `merge` them
    """

    scores: Literal["cosine", "dot"] = "cosine"
    weights: Literal["guarded", "ratio", "softmax"] = "guarded"
    overlay: Literal["mask", "grey"] = "mask"
    relation: Literal["parsed", "matched"] = "parsed"
    repeats: Literal["keep", "merge"] = "keep"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if (allowed := get_args(hint)) and getattr(self, name) not in allowed:
                raise UsageError(f"{name} is one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if not self.temperature > 0:
            raise UsageError(f"The temperature must be positive, got {self.temperature}.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Config, DEFAULT = ComClipConfig, ComClipConfig()


def comvg() -> ComClipConfig:
    """The official code on ComVG and SVO-Probes."""
    return ComClipConfig("dot", "ratio", "grey", "matched", "merge")


def winoground() -> ComClipConfig:
    """The official code on Winoground."""
    return ComClipConfig("cosine", "ratio", "grey", "parsed", "merge")


@dataclass(frozen=True)
class SubImage:
    """What is kept of a picture for some words: where `mask_HW` is True; None keeps the whole picture."""

    key: str
    kind: Literal["entity", "relation"]
    boxes: tuple[Box, ...]
    mask_HW: np.ndarray | None

    def of(self, pixels_HW3: np.ndarray) -> np.ndarray:
        return pixels_HW3 if self.mask_HW is None else keep(pixels_HW3, self.mask_HW)


def sub_images(
    pixels_HW3: np.ndarray, parse: Parse, regions: Regions, config: ComClipConfig = DEFAULT
) -> list[SubImage]:
    """The sub-images of a picture for a sentence: its entities in order, then its relations."""
    size = pixels_HW3.shape[:2]
    present_HW = grey(pixels_HW3) > 0 if config.overlay == "grey" else np.ones(size, bool)
    inside: dict[str, np.ndarray] = {}  # an entity without a box keeps the whole picture
    made = []
    for entity in parse.entities:
        if entity.name not in regions:
            raise UsageError(
                f"The match table has no entity {entity.name!r}; it has {', '.join(regions) or 'none'}.",
                hint="Give it an empty list if the picture does not show it.",
            )
        parts = regions[entity.name]
        masks = [np.ones(size, bool) if box is None else box_mask(box, size) for box in parts]
        inside[entity.name] = np.logical_or.reduce(masks) if masks else np.ones(size, bool)
        boxes = tuple(box for box in parts if box is not None)
        mask_HW = inside[entity.name] & present_HW if masks else None
        made.append(SubImage(entity.text, "entity", boxes, mask_HW))
    for relation in parse.relations:
        ends = [name for name in (relation.object, relation.subject) if name in inside]
        shown = len(ends) == 2 and (config.relation == "parsed" or all(regions[name] for name in ends))
        mask_HW = (inside[ends[0]] | inside[ends[1]]) & present_HW if shown else None
        boxes = tuple(box for name in ends for box in regions[name] if shown and box is not None)
        made.append(SubImage(relation.verb, "relation", boxes, mask_HW))
    made = [sub for sub in made if sub.key.strip()]
    return list({sub.key: sub for sub in made}.values()) if config.repeats == "merge" else made


class Blend(NamedTuple):
    """The score, the plain cosine, each sub-image's fit s_k and weight w_k; `note` where a guard acted."""

    score: Tensor
    plain: Tensor
    fit_K: Tensor
    weight_K: Tensor
    note: str | None


def weigh(fit_K: Tensor, config: ComClipConfig = DEFAULT) -> tuple[Tensor, str | None]:
    """Weights of sub-images by how well each fits its words, and what there is to say about them."""
    if not len(fit_K):
        return fit_K, "There are no sub-images, so the score is the plain cosine."
    if config.weights == "softmax":
        return (fit_K / config.temperature).softmax(0), None
    if config.weights == "ratio":
        if not float(fit_K.sum().abs()) > 1e-6 * float(fit_K.abs().max()):
            return torch.full_like(fit_K, torch.nan), "The sub-images' fits add up to 0: they have no ratio."
        return fit_K / fit_K.sum(), None
    if fit_K.isnan().any():  # as the encoder gave it: not a misfit
        return fit_K, None
    positive_K = fit_K.clamp_min(0)
    if not float(positive_K.sum()) > 1e-6:
        return torch.zeros_like(fit_K), "No sub-image fits its words, so the score is the plain cosine."
    misfits = int((fit_K <= 0).sum())
    note = f"{misfits} of {len(fit_K)} sub-images do not fit their words and have no weight."
    return positive_K / positive_K.sum(), note if misfits else None


def blend(
    text_D: Tensor,
    image_D: Tensor,
    key_KD: Tensor,
    sub_KD: Tensor,
    config: ComClipConfig = DEFAULT,
    *,
    logit_scale: float = 1.0,
) -> Blend:
    """ComCLIP's score from vectors as the encoder gives them, not normalised."""
    plain = F.cosine_similarity(text_D, image_D, dim=0)
    if config.scores == "cosine":
        image_D, key_KD, sub_KD = (F.normalize(x, dim=-1) for x in (image_D, key_KD, sub_KD))
        key_KD = logit_scale * key_KD
    fit_K = (key_KD * sub_KD).sum(-1)
    weight_K, note = weigh(fit_K, config)
    whole_D = image_D + weight_K @ sub_KD
    return Blend(F.cosine_similarity(text_D, whole_D, dim=0), plain, fit_K, weight_K, note)


@dataclass(frozen=True)
class Part:
    """A sub-image as it was weighed."""

    key: str
    kind: Literal["entity", "relation"]
    boxes: tuple[Box, ...]
    fit: float
    weight: float


@dataclass(frozen=True)
class Matched:
    """A picture and a sentence: ComCLIP's score, the plain cosine, and the sub-images."""

    score: float
    plain: float
    parts: tuple[Part, ...]
    note: str | None = None


class Pair(NamedTuple):
    """What is scored. `regions` None: find them by the model's patches."""

    parse: Parse
    picture: Image.Image
    regions: Regions | None = None


Finder = Callable[[Sequence[Image.Image], Sequence[Mapping[str, str]]], Sequence[Regions]]
"""Finds regions where none are given: pictures, and of each entity name -> phrase (`PatchRegions`)."""


class ComClip:
    """ComCLIP over a loaded model.

    `share=False` encodes every sub-image by itself, also equal ones. `truncate` cuts sentences that are too
    long for the text tower instead of refusing them.
    """

    def __init__(
        self,
        model: Model,
        config: ComClipConfig = DEFAULT,
        *,
        finder: Finder | None = None,
        batch_size: int = 32,
        share: bool = True,
        truncate: bool = False,
    ) -> None:
        if not (model.has_text and model.separable) or model.adaptation == "classifier":
            raise Refusal(
                f"The model '{model.name}' has no single vectors of pictures and texts to add and compare.",
                hint="Use a plain CLIP, such as --model builtin.",
            )
        self.model, self.config, self.batch_size = model, config, batch_size
        self.finder, self.share, self.truncate = finder, share, truncate
        self._texts: dict[str, Tensor] = {}

    def score(self, parse: Parse, picture: Image.Image, regions: Regions | None = None) -> Matched:
        return self.match([Pair(parse, picture, regions)])[0]

    def match(self, pairs: Sequence[Pair]) -> list[Matched]:
        """Scores of pairs, all their pictures and words encoded together."""
        pixels = [np.asarray(on_white(pair.picture)) for pair in pairs]
        found = self._find(pairs)
        subs = [
            sub_images(pixels_HW3, pair.parse, regions, self.config)
            for pixels_HW3, pair, regions in zip(pixels, pairs, found, strict=True)
        ]
        texts = self._embed_texts(
            [[pair.parse.sentence, *(sub.key for sub in part)] for pair, part in zip(pairs, subs)]
        )
        images = self._embed_images(pairs, pixels, subs)
        scale, matched = self.model.logit_scale, []
        for text_XD, image_XD, part in zip(texts, images, subs, strict=True):
            made = blend(text_XD[0], image_XD[0], text_XD[1:], image_XD[1:], self.config, logit_scale=scale)
            weighed = zip(part, made.fit_K.tolist(), made.weight_K.tolist(), strict=True)
            parts = tuple(Part(sub.key, sub.kind, sub.boxes, fit, weight) for sub, fit, weight in weighed)
            matched.append(Matched(float(made.score), float(made.plain), parts, made.note))
        return matched

    def _find(self, pairs: Sequence[Pair]) -> list[Regions]:
        lacking = [pair for pair in pairs if pair.regions is None]
        if not lacking:
            return [pair.regions or {} for pair in pairs]
        self.finder = self.finder or PatchRegions(self.model, batch_size=self.batch_size)
        phrases = [{entity.name: entity.text for entity in pair.parse.entities} for pair in lacking]
        found = iter(self.finder([on_white(pair.picture) for pair in lacking], phrases))
        return [next(found) if pair.regions is None else pair.regions for pair in pairs]

    def _embed_texts(self, texts: Sequence[Sequence[str]]) -> Iterator[Tensor]:
        """Vectors of each list of texts; every distinct text is encoded once."""
        new = [text for text in dict.fromkeys(t for some in texts for t in some) if text not in self._texts]
        if new:
            vectors_ND = self.model.embed_texts(new, normalize=False, truncate=self.truncate)
            self._texts.update(zip(new, torch.from_numpy(vectors_ND), strict=True))
        return (torch.stack([self._texts[text] for text in some]) for some in texts)

    def _embed_images(
        self, pairs: Sequence[Pair], pixels: Sequence[np.ndarray], subs: Sequence[Sequence[SubImage]]
    ) -> Iterator[Tensor]:
        """Vectors of each whole picture and its sub-images, equal ones encoded once."""
        rows: dict[Any, int] = {}
        jobs: list[tuple[int, SubImage]] = []
        places: list[list[int]] = []
        for n, pair in enumerate(pairs):
            places.append([])
            for k, sub in enumerate([SubImage("", "entity", (), None), *subs[n]]):
                whole = sub.mask_HW is None or bool(sub.mask_HW.all())
                kept = b"" if whole or sub.mask_HW is None else np.packbits(sub.mask_HW).tobytes()
                name = (id(pair.picture), kept) if self.share else (n, k)
                if name not in rows:
                    rows[name] = len(jobs)
                    jobs.append((n, sub))
                places[-1].append(rows[name])
        pictures = (Image.fromarray(sub.of(pixels[n])) for n, sub in jobs)
        vectors_ND = self.model.embed_pictures(pictures, batch_size=self.batch_size, normalize=False)
        return (torch.from_numpy(vectors_ND[some]) for some in places)


KEYS = Keys()
"""Nothing to rename: the method has no weights."""


def example(seed: int) -> Example:
    """The score of pairs from random vectors: two entities and a relation each."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"text_ND": (4, 8), "image_ND": (4, 8), "keys_NKD": (4, 3, 8), "subs_NKD": (4, 3, 8)}
    inputs = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}

    def run(text_ND: Tensor, image_ND: Tensor, keys_NKD: Tensor, subs_NKD: Tensor) -> dict[str, Tensor]:
        made = [blend(*row) for row in zip(text_ND, image_ND, keys_NKD, subs_NKD, strict=True)]
        names = ("score", "plain", "weight_K")
        return {name: torch.stack([getattr(one, name) for one in made]) for name in names}

    outputs = {"score": (4,), "plain": (4,), "weight_K": (4, 3)}
    return Example(run, inputs, outputs, batched=(*inputs, *outputs))


_ARMS = {
    "whole image": ComClipConfig(),
    "comclip": ComClipConfig(),
    "comclip, even weights": ComClipConfig(weights="softmax", temperature=1e9),
    "comclip, own regions": ComClipConfig(),
}


@lru_cache(maxsize=1)
def _trained(seed: int, steps: int, batch: int, pairs: int) -> Model:
    """The encoder of all arms: a CLIP after a short training, which counts words and does not bind them."""
    from moviola.training.brief import fit
    from moviola.training.objectives import Contrastive

    model = two_things.small_model(seed)
    data = two_things.tensors(two_things.scenes(seed, pairs), seed)
    fit(model.module, Contrastive(), data, steps=steps, batch=batch, lr=3e-3, seed=seed)
    return model


def run_claim(
    arm: str, seed: int, *, steps: int = 600, batch: int = 96, pairs: int = 8000, count: int = 500
) -> dict[str, float]:
    """How often a true scene scores above one that its sentence does not fit, `count` of each kind.

    The sentences' parses are the true ones. `comclip` is given the boxes and phrases of a perfect dense
    captioner, matched by words; `own regions` has none and looks at the encoder's patches.
    """
    true, wrong = two_things.contrasts(seed, count)
    matcher = ComClip(_trained(seed, steps, batch, pairs), _ARMS[arm])
    parses = true.parses()

    def scores(made: two_things.Scenes, draw: int) -> np.ndarray:
        pictures = [Image.fromarray(pixels_SS3) for pixels_SS3 in made.draw(draw)]
        given = [None if "own" in arm else by_words(parses[n], made.regions(n)) for n in range(count)]
        found = matcher.match([Pair(*row) for row in zip(parses, pictures, given, strict=True)])
        return np.array([one.plain if arm == "whole image" else one.score for one in found])

    right_N = scores(true, seed + 1)
    right = {name: pairwise_accuracy(right_N, scores(made, seed + 2)) for name, made in wrong.items()}
    figures = {f"{name}, %": one.accuracy for name, one in right.items()}
    return {
        "swapped pairs, %": (figures["swapped roles, %"] + figures["swapped attributes, %"]) / 2,
        **figures,
    }


CLAIM = Claim(
    statement="Weighed sub-images tell swapped things and attributes better than the whole picture does.",
    data="made scenes of two things: 500 pairs each of swapped roles or colours, or with one word changed",
    metric="swapped pairs, %",
    arms=tuple(_ARMS),
    ours="comclip",
    baseline="whole image",
    run=run_claim,
)
