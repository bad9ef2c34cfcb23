"""ZSARCap: a video and a class are each told in sentences, and the nearest class sentence names the video.

Captioners ("observers") say what they see in a video, and free text from the web says what a class looks
like: of each class the sentences nearest its name are kept, and each is a prototype. A video's observations,
joined to one text, belong to the class of the nearest prototype in a sentence encoder's space. Nothing is
trained, and pixels are seen by the captioners alone.

Estevam, Laroca, Pedrini, Menotti: "Tell me what you see: A zero-shot action recognition method based on
natural language descriptions", arXiv 2112.09976. Official code: valterlej/zsarcap.

    class     S_c = the n sentences of its documents, m words or more, with the largest cos(e(s), e(name_c))
    prototype p = e("s name_c") for every s in S_c
    video     v = e("o_1 o_2 ... o_K"), o_k the first sentence of observer k, if it says any
    decision  the class of the p with the smallest 1 - cos(v, p)

Known differences
- Officially the last character of every line of a document is dropped, meant as the newline: a last line
  without one loses its full stop or a letter. Here no letter is lost; `drop_last` restores it.
- Officially sentences are split by NLTK's punkt and contractions written out by a package's table; here both
  are by rules (`data.prose`), and lines are split before they are lower-cased, so that capitals help.
- A class without a sentence left is an error here. Officially it has no prototype, which is only printed, and
  can never be told; a class of the split file that is not in the list is passed over silently.
- Sentences of a dictionary's definition are officially glued to the class name without a space between;
  `definition_gap=""` restores it. They come on top of the n sentences, without selection, as officially.
- A file's true class is officially the first class whose name is a substring of the file's name, which calls
  "climb stairs" "climb". Here an explicit map is asked for; `substring_classes` has the rule, and says
  which files fit several classes.
- Officially "top k" counts a hit where one of the k nearest SENTENCES is of the class. `neighbour_hits` has
  that; `class_distances` ranks distinct classes, each by its nearest sentence.
- Equal distances: the earlier prototype. Officially their order is left to the library.
- `scale` turns distances into probabilities for people to read; it is not the paper's and decides nothing.

Axis letters: P prototypes, N videos, C classes, D embedding width.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor

from moviola.clip.keys import Keys
from moviola.data import told_clips
from moviola.data.prose import expand_contractions, split_sentences
from moviola.types import Claim, Example, UsageError

Embed = Callable[[list[str]], np.ndarray]
"""A sentence encoder: texts -> vectors_ND, not necessarily of length 1."""

_MARKS = "?.!,\u00bf"


@dataclass(frozen=True)
class ZsarCapConfig:
    """How sentences are chosen and compared.

    min_words       a sentence of a document needs so many words, contractions written out, before cleaning
    max_sentences   the most sentences a class keeps of its documents
    prototypes      a vector for every `sentence`, their `mean`, or one of the sentences run together
    observations    of each observer the `first` sentence of a video, or `all` of them
    metric          `cosine` or `euclidean` distance
    scale           probability = softmax(-scale * distance to each class's nearest prototype)
    """

    min_words: int = 15
    max_sentences: int = 10
    prototypes: Literal["sentence", "mean", "document"] = "sentence"
    observations: Literal["first", "all"] = "first"
    metric: Literal["cosine", "euclidean"] = "cosine"
    scale: float = 20.0
    definition_gap: str = " "
    drop_last: bool = False

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if (allowed := get_args(hint)) and getattr(self, name) not in allowed:
                raise UsageError(f"{name} is one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.min_words < 1 or self.max_sentences < 1 or not self.scale > 0:
            raise UsageError(
                "min_words and max_sentences must be at least 1 and scale positive, got "
                f"{self.min_words}, {self.max_sentences} and {self.scale}."
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Config, DEFAULT = ZsarCapConfig, ZsarCapConfig()


# ------------------------------------------------------------------------------------------- words


def clean(text: str, *, pad: bool = True) -> str:
    """Lower case, no accents, only letters and ? . ! , (`pad`: with spaces around them), single spaces."""
    plain = unicodedata.normalize("NFD", text.lower().strip())
    plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
    if pad:
        plain = re.sub(f"([{_MARKS}])", r" \1 ", plain)
    return re.sub(f"[^a-zA-Z{_MARKS}]+", " ", plain).strip()


def squeeze(name: str) -> str:
    """What names of classes and files are compared by: lower case, no spaces, underscores, brackets, '."""
    return re.sub(r"[ _()']", "", name.lower())


def document_sentences(text: str, config: ZsarCapConfig = DEFAULT) -> list[str]:
    """A document's sentences of `min_words` words or more, cleaned, in order."""
    lines = text.split("\n")
    if config.drop_last:  # of the other lines it is the newline
        lines[-1] = lines[-1][:-1]
    sentences = (expand_contractions(one) for line in lines for one in split_sentences(line))
    kept = [one for one in sentences if len(one.split(" ")) >= config.min_words]
    return [cleaned for one in kept if (cleaned := clean(one, pad=False))]


def substring_classes(files: Sequence[str], classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Of each file the classes whose name is in its name, in the order of `classes`: officially the first
    of them is the truth. Files that fit none are left out."""
    keys = [squeeze(name) for name in classes]
    fitting = {file: tuple(c for c, key in zip(classes, keys) if key in squeeze(file)) for file in files}
    return {file: some for file, some in fitting.items() if some}


# ----------------------------------------------------------------------------------------- vectors


@dataclass(frozen=True)
class Prototypes:
    """Vectors of class sentences: `vector_PD`, and the number `owner_P` of the class in `classes`.

    `sentences` (of each class) is what was embedded.
    """

    classes: tuple[str, ...]
    vector_PD: np.ndarray
    owner_P: np.ndarray
    sentences: Mapping[str, tuple[str, ...]]

    def among(self, classes: Sequence[str]) -> Prototypes:
        """Only those of `classes`, in that order. Class numbers stay."""
        number = {name: index for index, name in enumerate(self.classes)}
        if unknown := [name for name in classes if name not in number]:
            raise UsageError(f"There are no prototypes of {', '.join(unknown[:5])}.")
        rows = [np.flatnonzero(self.owner_P == number[name]) for name in classes]
        rows_P = np.concatenate([np.empty(0, np.int64), *rows])
        return Prototypes(self.classes, self.vector_PD[rows_P], self.owner_P[rows_P], self.sentences)


def distances(
    vector_ND: np.ndarray, prototype_PD: np.ndarray, metric: Literal["cosine", "euclidean"] = "cosine"
) -> np.ndarray:
    """distance_NP. A vector of zeros is at cosine distance 1 from everything."""
    if metric == "euclidean":
        video_ND, class_PD = torch.from_numpy(vector_ND), torch.from_numpy(prototype_PD)
        return torch.cdist(video_ND, class_PD, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    return 1 - _unit(vector_ND) @ _unit(prototype_PD).T


def _unit(vector_ND: np.ndarray) -> np.ndarray:
    length_N1 = np.linalg.norm(vector_ND, axis=1, keepdims=True)
    return vector_ND / np.where(length_N1 > 0, length_N1, 1)


def neighbour_hits(distance_NP: np.ndarray, owner_P: np.ndarray, label_N: np.ndarray, k: int) -> int:
    """How many videos have a prototype of their class among the k nearest (officially "top k")."""
    if not 1 <= k <= len(owner_P):
        raise UsageError(
            f"{k} nearest neighbours cannot be taken of {len(owner_P)} prototypes.",
            hint="Ask for fewer, or keep more sentences of each class (max_sentences).",
        )
    nearest_NK = np.argsort(distance_NP, axis=1, kind="stable")[:, :k]
    return int((owner_P[nearest_NK] == label_N[:, None]).any(1).sum())


def class_distances(distance_NP: np.ndarray, owner_P: np.ndarray, classes: int) -> np.ndarray:
    """Each class's nearest prototype: distance_NC, infinite for a class without one."""
    nearest_NC = np.full((len(distance_NP), classes), np.inf)
    for owner in np.unique(owner_P):
        nearest_NC[:, owner] = distance_NP[:, owner_P == owner].min(1)
    return nearest_NC


def closeness(sentence_PD: np.ndarray, name_D: np.ndarray) -> np.ndarray:
    """1 - d / (max d + 0.1) of each sentence of a class, d its Euclidean distance from the class's name.

    The official code computes it and lets it decide nothing.
    """
    distance_P = np.linalg.norm(sentence_PD - name_D, axis=1)
    return 1 - distance_P / (distance_P.max() + 0.1)


class ZsarCap:
    """The method over a sentence encoder; `selector` is another one for the choice of class sentences.

        cap = ZsarCap(encoder)
        prototypes = cap.build_prototypes({"ride horse": Path("ride_horse.txt").read_text(), ...})
        cap.classify(["A man sits on a horse", "The horse runs"], prototypes)

    gives (class, distance) pairs, nearest first.
    """

    def __init__(
        self, embed: Embed, config: ZsarCapConfig = DEFAULT, *, selector: Embed | None = None
    ) -> None:
        self.embed, self.config, self.selector = embed, config, selector or embed

    def select(self, documents: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
        """Of each class (name -> text) the cleaned sentences nearest its name, nearest first."""
        found = {name: document_sentences(text, self.config) for name, text in documents.items()}
        kept = {}
        for name, sentences in found.items():
            kept[name] = tuple(sentences)
            if sentences:
                key_1D, sentence_PD = np.split(_vectors(self.selector, [clean(name), *sentences]), [1])
                order_P = np.argsort(distances(key_1D, sentence_PD)[0], kind="stable")
                kept[name] = tuple(sentences[p] for p in order_P[: self.config.max_sentences])
        return kept

    def class_sentences(
        self, documents: Mapping[str, str], definitions: Mapping[str, str] | None = None
    ) -> dict[str, tuple[str, ...]]:
        """What is embedded of each class: its sentences with its name behind; then those of its definition.

        `UsageError` names the classes of whose text nothing is left.
        """
        made = {}
        for name, sentences in self.select(documents).items():
            label = clean(name)
            defined = document_sentences((definitions or {}).get(name, ""), self.config)
            gap = self.config.definition_gap
            made[name] = (*(f"{clean(s)} {label}" for s in sentences), *(s + gap + label for s in defined))
        if empty := [name for name, sentences in made.items() if not sentences]:
            raise UsageError(
                f"{len(empty)} of {len(made)} classes have no sentence of {self.config.min_words} words or "
                f"more in their documents: {', '.join(empty[:5])}. No video could be told to be one of them.",
                hint="Write longer sentences of them, lower min_words (--min-words), or leave them out.",
            )
        return made

    def build_prototypes(
        self, documents: Mapping[str, str], definitions: Mapping[str, str] | None = None
    ) -> Prototypes:
        """Prototypes of classes from their documents, class name -> text."""
        return self.embed_prototypes(self.class_sentences(documents, definitions))

    def embed_prototypes(self, sentences: Mapping[str, Sequence[str]]) -> Prototypes:
        """Prototypes from sentences as they are, class name -> sentences: of names alone, say."""
        kept = {name: tuple(some) for name, some in sentences.items()}
        if self.config.prototypes == "document":
            vector_PD = _vectors(self.embed, [" ".join(some) for some in kept.values()])
            return Prototypes(tuple(kept), vector_PD, np.arange(len(kept)), kept)
        owner_P = np.repeat(np.arange(len(kept)), [len(some) for some in kept.values()])
        vector_PD = _vectors(self.embed, [one for some in kept.values() for one in some])
        if self.config.prototypes == "mean":
            mean_CD = np.stack([vector_PD[owner_P == c].mean(0) for c in range(len(kept))])
            return Prototypes(tuple(kept), mean_CD, np.arange(len(kept)), kept)
        return Prototypes(tuple(kept), vector_PD, owner_P, kept)

    def told(self, observers: Sequence[Sequence[str]]) -> str:
        """The one text of a video from what each observer said; empty where none said anything."""
        said = [[one.lower() for one in sentences if one.strip()] for sentences in observers]
        if self.config.observations == "first":
            said = [sentences[:1] for sentences in said]
        return " ".join(one for sentences in said for one in sentences)

    def distances(self, texts: Sequence[str], prototypes: Prototypes) -> np.ndarray:
        """distance_NP of videos' texts from prototypes. Equal texts are embedded once."""
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        vector_ND = _vectors(self.embed, list(distinct))[[distinct[text] for text in texts]]
        return distances(vector_ND, prototypes.vector_PD, self.config.metric)

    def classify(self, observed: Sequence[str], prototypes: Prototypes) -> list[tuple[str, float]]:
        """Classes by the distance of a video's sentences, one an observer, nearest first."""
        text = self.told([[sentence] for sentence in observed])
        if not text:
            raise UsageError("No observer said anything about the video.", hint="Give it a sentence.")
        distance_1P = self.distances([text], prototypes)
        distance_C = class_distances(distance_1P, prototypes.owner_P, len(prototypes.classes))[0]
        return [(prototypes.classes[c], float(distance_C[c])) for c in np.argsort(distance_C, kind="stable")]


def _vectors(embed: Embed, texts: list[str]) -> np.ndarray:
    """Checked vectors_ND of an encoder of anyone's."""
    vector_ND = np.asarray(embed(texts))
    if vector_ND.ndim != 2 or len(vector_ND) != len(texts):
        raise UsageError(
            f"The sentence encoder gave {vector_ND.shape} for {len(texts)} texts, expected a vector for each."
        )
    if not np.isfinite(vector_ND).all():
        raise UsageError("The sentence encoder gave vectors that are not finite.")
    return vector_ND


KEYS = Keys()
"""Nothing to rename: the method has no weights."""


def example(seed: int) -> Example:
    """Videos and prototypes of three classes from random vectors."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"video_ND": torch.randn(5, 8, generator=generator)}
    prototype_PD = torch.randn(9, 8, generator=generator).numpy()
    owner_P = np.repeat(np.arange(3), 3)

    def run(video_ND: Tensor) -> dict[str, Tensor]:
        distance_NP = distances(video_ND.numpy(), prototype_PD)
        distance_NC = class_distances(distance_NP, owner_P, 3)
        return {"distance": torch.from_numpy(distance_NP), "classes": torch.from_numpy(distance_NC).float()}

    return Example(
        run, inputs, {"distance": (5, 9), "classes": (5, 3)}, batched=("video_ND", "distance", "classes")
    )


_ARMS = {  # encoder, what is known of classes, observers
    "class names": ("transformer", "names", 3),
    "class names made sentences": ("transformer", "sentences", 3),
    "one observer": ("transformer", "documents", 1),
    "averaged word vectors": ("word vectors", "documents", 3),
    "zsarcap": ("transformer", "documents", 3),
}


def run_claim(
    arm: str, seed: int, *, steps: int = 500, scenes: int = 2000, batch: int = 16, count: int = 600
) -> dict[str, float]:
    """Top-1 of `count` told clips among twelve ordered pairs of actions, and among the six without order.

    The encoders learn from paraphrases of other pairs, the same ones in the same steps; nothing learns from
    the classes, their documents or what observers say of the clips.
    """
    from moviola.training.paraphrases import embed_told, told_encoder

    kind, known, observers = _ARMS[arm]
    encoder = told_encoder(kind, seed, steps, scenes, batch)
    cap = ZsarCap(lambda texts: embed_told(encoder, texts))
    names = told_clips.CLASSES
    if known == "documents":
        prototypes = cap.build_prototypes(told_clips.documents(seed))
    else:
        said_of = names if known == "names" else told_clips.SENTENCES
        prototypes = cap.embed_prototypes({name: [one] for name, one in zip(names, said_of, strict=True)})
    said, label_N = told_clips.observations(seed, count, observers)
    distance_NP = cap.distances([cap.told([[one] for one in some]) for some in said], prototypes)
    nearest_N = class_distances(distance_NP, prototypes.owner_P, len(names)).argmin(1)
    return {
        "top-1, %": float((nearest_N == label_N).mean() * 100),
        "actions without order, %": float((nearest_N // 2 == label_N // 2).mean() * 100),
    }


CLAIM = Claim(
    statement="Documents beat class names, several observers one, a sentence encoder averaged word vectors.",
    data="600 told clips of two actions in order, by imperfect observers; 12 classes new to the encoders",
    metric="top-1, %",
    arms=tuple(_ARMS),
    ours="zsarcap",
    baseline="class names",
    run=run_claim,
)
