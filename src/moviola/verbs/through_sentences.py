"""`classify --through-sentences`: which class a video shows, by sentences that observers say of it.

Videos and classes are both turned into sentences and compared in a sentence encoder's space
(`moviola.systems.video.zsarcap`); pixels are seen by the observers alone, and nothing is trained.

Axis letters: N videos, P prototypes (class sentences), C classes, D embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moviola.data.class_documents import document_names, read_documents
from moviola.data.observers import Captioner, Captions, observe, read_captions
from moviola.metrics.calibration import softmax
from moviola.types import Dtype, Refusal, UsageError
from moviola.verbs.classify import Classification, Classified, Label, NothingClassified, class_names
from moviola.verbs.common import Progress, Skipped, counting_cuts, cut_note, resolve

if TYPE_CHECKING:
    from moviola.clip.loaded import Model
    from moviola.systems.video.zsarcap import Embed, Prototypes, ZsarCap, ZsarCapConfig

Observer = str | Path | Captions | Captioner
Documents = str | Path | Mapping[str, str]


def classify_through_sentences(
    files: str | Path | Sequence[str | Path],
    classes: str | Path | Sequence[str] | None = None,
    *,
    captions: Observer | Sequence[Observer],
    documents: Documents | None = None,
    definitions: Documents | None = None,
    encoder: str | Path | Model | Embed = "builtin",
    selector: str | Path | Model | Embed | None = None,
    config: ZsarCapConfig | None = None,
    k: int = 5,
    encoding: str = "utf-8",
    device: str = "auto",
    dtype: Dtype | None = None,
    tokenizer: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Classification:
    """The `k` most probable of `classes` for every picture and video under `files`, by what is said of them.

    classes      names, as `classify` takes them. None: those that there are documents of
    captions     the observers, one or several: caption files (`data.observers`), mappings from a video's name
                 to sentences, or captioners: callables from a path to sentences
    documents    free text about each class: a folder with CLASS.txt, a JSON file, or a mapping. None: the
                 class names alone are compared
    definitions  a dictionary's definitions of classes in the same forms, added to the documents' sentences
    encoder      the sentence space: a model with a text tower, a folder of a sentence-transformers or
                 `transformers` text model, or a callable list of texts -> vectors_ND
    selector     another encoder for the choice of the documents' sentences
    config       how sentences are chosen and compared (`ZsarCapConfig`)
    encoding     of the documents of a folder

    A probability is the softmax of -`config.scale` times each class's distance: for reading only. A video of
    which no observer says anything stands in `failed`; `NothingClassified` if that is all of them.
    """
    from moviola.media import walk
    from moviola.systems.video.zsarcap import class_distances

    if k < 1:
        raise UsageError(f"k must be at least 1, got {k}.", hint="Ask for one class or more.")
    if classes is None and documents is not None:
        classes = document_names(documents, encoding=encoding)
    names = class_names(classes)
    observers = read_observers(captions)
    failed: list[Skipped] = []
    found = {one.path: one.kind for one in walk(files, on_skip=lambda p, why: failed.append(_skip(p, why)))}
    space = SentenceSpace.open(encoder, selector, config, device=device, dtype=dtype, tokenizer=tokenizer)
    told = space.tell(observers, list(found), failed, on_progress)
    if not told:
        raise NothingClassified(
            f"Nothing was classified: of the {len(failed)} files none has a caption. The first: {failed[0]}."
            if failed
            else "Nothing was classified: there are no pictures or videos under the given paths.",
            failed,
            hint="Caption files name videos by file name, with or without ending and 'v_' before it.",
        )
    with counting_cuts() as cut:
        prototypes = space.prototypes(names, documents, definitions, encoding)
        distance_NP = space.cap.distances(list(told.values()), prototypes)
    distance_NC = class_distances(distance_NP, prototypes.owner_P, len(names))
    results = []
    for path, distance_C in zip(told, distance_NC, strict=True):
        probability_C = softmax(-space.cap.config.scale * distance_C[None])[0]
        order = np.argsort(distance_C, kind="stable")[:k]
        labels = tuple(Label(names[c], float(probability_C[c])) for c in order)
        results.append(Classified(str(path), found[path], labels))
    notes = [*space.notes, *cut_note(cut)]
    return Classification(tuple(results), names, (), space.name, tuple(failed), tuple(notes))


# ------------------------------------------------------------------------------------- the space


class SentenceSpace:
    """The method with its encoder, what is to be said about it, and its name."""

    def __init__(self, cap: ZsarCap, name: str) -> None:
        self.cap, self.name = cap, name
        self.notes: list[str] = []

    @classmethod
    def open(
        cls,
        encoder: str | Path | Model | Embed,
        selector: str | Path | Model | Embed | None,
        config: ZsarCapConfig | None,
        **place: Any,
    ) -> SentenceSpace:
        from moviola.systems.video.zsarcap import ZsarCap, ZsarCapConfig

        embed, name = sentence_encoder(encoder, **place)
        select = None if selector is None else sentence_encoder(selector, **place)[0]
        return cls(ZsarCap(embed, config or ZsarCapConfig(), selector=select), name)

    def prototypes(
        self,
        names: Sequence[str],
        documents: Documents | None,
        definitions: Documents | None,
        encoding: str,
    ) -> Prototypes:
        """Of the classes' documents and definitions, or of their names where there are neither."""
        from moviola.systems.video.zsarcap import clean, squeeze

        if twice := [key for key, count in Counter(map(squeeze, names)).items() if count > 1]:
            raise UsageError(f"Classes differ in spaces, case or brackets alone: {', '.join(twice[:5])}.")
        if blank := [name for name in names if not clean(name)]:
            raise UsageError(
                f"The class name {blank[0]!r} holds no letter from a to z, and no others are kept.",
                hint="Name classes in English letters.",
            )
        if documents is None and definitions is None:
            return self.cap.embed_prototypes({name: [clean(name)] for name in names})
        texts = dict.fromkeys(names, "") if documents is None else self._read(documents, names, encoding)
        defined = None if definitions is None else self._read(definitions, names, encoding, some=True)
        made = self.cap.build_prototypes(texts, defined)
        most = self.cap.config.max_sentences
        few = [name for name in names if len(made.sentences[name]) < most]
        if few:
            self.notes.append(f"{len(few)} classes have fewer than {most} sentences: {', '.join(few[:5])}.")
        return made

    def _read(
        self, documents: Documents, names: Sequence[str], encoding: str, *, some: bool = False
    ) -> dict[str, str]:
        from moviola.systems.video.zsarcap import squeeze

        texts, unused = read_documents(documents, names, key=squeeze, encoding=encoding, some=some)
        if unused:
            self.notes.append(f"{len(unused)} documents are of no class named: {', '.join(unused[:5])}.")
        return texts

    def tell(
        self,
        observers: Sequence[Captions | Captioner],
        videos: Sequence[Path],
        failed: list[Skipped],
        on_progress: Progress | None,
    ) -> dict[Path, str]:
        """The text of each video; those of which nobody says anything go to `failed`."""
        unread: dict[Path, str] = {}
        said = []
        for done, observer in enumerate(observers, 1):
            said.append(observe(observer, videos, on_skip=unread.__setitem__))
            if not said[-1]:
                self.notes.append(f"Observer {done} says nothing about any of the {len(videos)} videos.")
            if on_progress is not None:
                on_progress(done, len(observers), f"observer {done}")
        told, partly = {}, 0
        for video in videos:
            heard = [one[video] for one in said if video in one]
            if heard:
                told[video] = self.cap.told(heard)
                partly += len(heard) < len(said)
            else:
                failed.append(_skip(video, unread.get(video, "no observer says anything about it")))
        if partly:
            self.notes.append(
                f"{partly} of {len(told)} videos are told by some of the {len(said)} observers."
            )
        return told


def sentence_encoder(
    encoder: str | Path | Model | Embed,
    *,
    device: str = "auto",
    dtype: Dtype | None = None,
    tokenizer: str | Path | None = None,
) -> tuple[Embed, str]:
    """texts -> vectors_ND, and what to call it; see `classify_through_sentences`.

    `Refusal` for a model without a text tower.
    """
    from moviola.clip.loaded import Model, choose_device
    from moviola.parts.sentence_encoder import SentenceEncoder, is_text_model

    if callable(encoder) and not isinstance(encoder, Model):
        return encoder, str(getattr(encoder, "name", None) or getattr(encoder, "__name__", "an encoder"))
    if isinstance(encoder, str | Path) and is_text_model(encoder):
        read = SentenceEncoder(encoder, device=str(choose_device(device)))
        return read, read.name
    model = resolve(encoder, device=device, dtype=dtype, tokenizer=tokenizer)
    if not model.has_text:
        raise Refusal(
            f"The model '{model.name}' has no text tower, so it cannot compare sentences.",
            hint="Name another sentence encoder: encoder= (--sentence-encoder).",
        )
    return lambda texts: model.embed_texts(texts, normalize=False, truncate=True), model.name


def _skip(path: Path, why: str) -> Skipped:
    return Skipped(str(path), why)


def read_observers(captions: Observer | Sequence[Observer]) -> list[Captions | Captioner]:
    """The observers given, files read."""
    given = [captions] if isinstance(captions, str | Path | Mapping) or callable(captions) else list(captions)
    if not given:
        raise UsageError("There are no observers.", hint="Give a caption file: captions= (--captions FILE).")
    return [read_captions(one) if isinstance(one, str | Path) else one for one in given]
