"""`evaluate`: zero-shot classification and retrieval of a model on a labelled set.

Axis letters: N items or texts, M items of a gallery, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from moviola.data.classes import ClassSet, Names, read_classes
from moviola.data.retrieval import Layout, RetrievalSet, read_retrieval
from moviola.metrics.classification import mean_class_accuracy, per_class_accuracy, topk_accuracy
from moviola.metrics.retrieval import rank_metrics, text_to_video_ranks, video_to_text_ranks
from moviola.types import Dtype, UsageError
from moviola.verbs.classify import ClassScorer, Head, choose_head, class_templates, refuse_without_words
from moviola.verbs.common import (
    Progress,
    Skipped,
    counting_cuts,
    cut_note,
    resolve,
)
from moviola.verbs.figures import RetrievalReport, ZeroShotReport
from moviola.verbs.set_reader import SetReader
from moviola.verbs.views import view_scores

if TYPE_CHECKING:
    from moviola.clip.loaded import Model


def evaluate_zero_shot(
    model: str | Path | Model,
    data: str | Path | ClassSet,
    *,
    templates: str | Path | Sequence[str] | None = None,
    split: str | None = None,
    names: Names | None = None,
    label_column: str | None = None,
    media_column: str | None = None,
    media_root: str | Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: Dtype | None = None,
    tokenizer: str | Path | None = None,
    batch_size: int = 32,
    frames: int | None = None,
    truncate: bool = False,
    views: tuple[int, int] = (1, 1),
    head: Head | None = None,
    cache: str | Path | None = None,
    on_progress: Progress | None = None,
) -> ZeroShotReport:
    """Zero-shot top-1 and top-5 on a folder per class or a table; see `read_classes` for layouts.

    templates  a set (`simple`, `general`, `video`), a file, or sentences with `{}`
    limit      at most so many items, drawn by hash: the same ones each time, from every class
    views      (clips, crops): the mean softmax over so many clips of a video and crops of a frame
    head       as in `classify`
    cache      a folder where the items' vectors are kept, so that other templates cost no new pass;
               a changed file, model or recipe makes a new entry

    A class as high as the right one counts as ranked before it. Items that cannot be read stand in
    `failed` and are left out of the figures.
    """
    if isinstance(data, ClassSet):
        if any(value is not None for value in (split, names, label_column, media_column, media_root)):
            raise UsageError("split, names, columns and media_root belong to read_classes here.")
        found = data
    else:
        found = read_classes(
            data,
            split=split,
            names=names,
            label_column=label_column,
            media_column=media_column,
            media_root=media_root,
        )
    loaded = resolve(model, device=device, dtype=dtype, tokenizer=tokenizer)
    own = choose_head(loaded, head) == "own"
    sentences = class_templates(loaded, templates, "evaluate", own=own)
    rows = found.sample(limit)
    with counting_cuts() as cut:
        scorer = ClassScorer(
            loaded, found.classes, sentences, batch_size=batch_size, frames=frames, truncate=truncate, own=own
        )
    failed = [Skipped(*one) for one in found.skipped]
    work = SetReader(
        loaded,
        found,
        rows,
        batch_size=batch_size,
        frames=frames,
        cache=cache,
        failed=failed,
        on_progress=on_progress,
    )
    if views != (1, 1):
        index_N, scores_NC = view_scores(
            scorer,
            found,
            rows,
            views,
            frames=frames,
            batch_size=batch_size,
            failed=failed,
            on_progress=on_progress,
        )
    elif loaded.separable and scorer.own is None:
        index_N, vectors_ND = work.vectors()
        scores_NC = scorer.logits(vectors_ND)
    else:
        index_N, scores_NC = work.scores(scorer)
    return zero_shot_report(
        loaded, found, index_N, scores_NC, len(sentences), failed, _notes(len(rows), len(found), cut)
    )


def zero_shot_report(
    model: Model,
    found: ClassSet,
    index_N: np.ndarray,
    scores_NC: np.ndarray,
    templates: int,
    failed: Sequence[Skipped],
    notes: Sequence[str],
) -> ZeroShotReport:
    """The figures of scores of the items `index_N`; `templates` 0 for a classifier of the model's own."""
    labels_N = found.labels_N[index_N]
    ks = (1, 5) if len(found.classes) > 5 else (1,)
    top = topk_accuracy(scores_NC, labels_N, ks)
    names_C = [
        f"{name} ({index})" if name in found.repeated else name for index, name in enumerate(found.classes)
    ]
    per_class = {
        names_C[index]: float(value)
        for index, value in enumerate(per_class_accuracy(scores_NC, labels_N))
        if np.isfinite(value)
    }
    return ZeroShotReport(
        model=model.name,
        data=str(found.source),
        split=found.split,
        n=len(labels_N),
        classes=len(found.classes),
        templates=templates,
        top1=top["top1"],
        top5=top.get("top5"),
        mean_per_class=mean_class_accuracy(scores_NC, labels_N),
        per_class=per_class,
        failed=tuple(failed),
        notes=(*notes, *_notes_of_classes(found, len(per_class))),
    )


def evaluate_retrieval(
    model: str | Path | Model,
    data: str | Path | RetrievalSet,
    *,
    layout: Layout = "auto",
    split: str = "test",
    media_root: str | Path | None = None,
    media_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    captions_per_item: int | None = None,
    among: Literal["auto", "items", "captions"] = "auto",
    limit: int | None = None,
    device: str = "auto",
    dtype: Dtype | None = None,
    tokenizer: str | Path | None = None,
    batch_size: int = 32,
    frames: int | None = None,
    truncate: bool = False,
    cache: str | Path | None = None,
    on_progress: Progress | None = None,
) -> RetrievalReport:
    """Image-text or text-video retrieval, both ways; see `read_retrieval` for layouts.

    among   what an item's captions are ranked among; `auto` is all captions for pictures, and each
            item's best caption for videos, as their benchmarks have it
    limit   at most so many items with their texts, drawn by hash. A smaller gallery is an easier one
    cache   as in `evaluate_zero_shot`, for models that give one vector per item

    An item as similar as the right one counts as ranked before it. A model that is not separable is
    asked through its own `score`, item by item against every text. Items that cannot be read stand
    in `failed`; they and their texts are left out.
    """
    if among not in ("auto", "items", "captions"):
        raise UsageError(f"among must be auto, items or captions, got {among!r}.")
    if isinstance(data, RetrievalSet):
        found = data
    else:
        found = read_retrieval(
            data,
            layout=layout,
            split=split,
            media_root=media_root,
            media_column=media_column,
            text_column=text_column,
            id_column=id_column,
            captions_per_item=captions_per_item,
        )
    loaded = resolve(model, device=device, dtype=dtype, tokenizer=tokenizer)
    refuse_without_words(loaded, "evaluate")
    rows = found.sample(limit)
    kept_N = np.flatnonzero(np.isin(found.owner_N, rows))
    # texts first: one that is too long is then found before the pictures are embedded
    with counting_cuts() as cut:
        texts = [found.texts[n] for n in kept_N]
        embed = loaded.embed_texts if loaded.separable else loaded.embed_queries
        text_ND = embed(texts, truncate=truncate)
    failed = [Skipped(*one) for one in found.missing]
    work = SetReader(
        loaded,
        found,
        rows,
        batch_size=batch_size,
        frames=frames,
        cache=cache,
        failed=failed,
        on_progress=on_progress,
    )
    if loaded.separable:
        index_M, vectors_MD = work.vectors()
        sims_NM = text_ND @ vectors_MD.T
    else:
        index_M, sims_NM = work.similarities(text_ND)
    column = np.full(len(found), -1)
    column[index_M] = np.arange(len(index_M))
    owner_N = column[found.owner_N[kept_N]]
    usable_N = owner_N >= 0
    if not usable_N.all():
        sims_NM, owner_N = sims_NM[usable_N], owner_N[usable_N]
    if among == "auto":
        among = "captions" if found.kind == "picture" else "items"
    item_ranks_M = video_to_text_ranks(
        sims_NM, owner_N, among="captions" if among == "captions" else "videos"
    )
    return RetrievalReport(
        model=loaded.name,
        data=str(found.source),
        layout=found.layout,
        split=found.split,
        n_items=len(index_M),
        n_texts=len(owner_N),
        among=among,
        text_to_item=rank_metrics(text_to_video_ranks(sims_NM, owner_N)),
        item_to_text=rank_metrics(item_ranks_M),
        failed=tuple(failed),
        notes=_notes(len(rows), len(found), cut),
    )


def _notes_of_classes(data: ClassSet, seen: int) -> list[str]:
    notes = []
    if data.repeated:
        notes.append(
            "Names given to more than one class, which words cannot tell apart: "
            f"{', '.join(data.repeated[:5])}."
        )
    if seen < len(data.classes):
        notes.append(f"{len(data.classes) - seen} of {len(data.classes)} classes have no item here.")
    return notes


def _notes(used: int, there: int, cut: Sequence[str]) -> tuple[str, ...]:
    notes = [f"A sample of {used} of {there} items."] if used < there else []
    return (*notes, *cut_note(cut))
