"""`embed`: pictures, videos and texts to vectors, in memory or as a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moviola.types import Clip, Dtype, MediaError, Refusal, UsageError, printable
from moviola.verbs.common import Progress, Skipped, embed_media, resolve, summary
from moviola.verbs.vectors import Row, Sink, read_vectors, sink_for

if TYPE_CHECKING:
    from moviola.clip.loaded import Model
    from moviola.media import Found

_TEXTS = 256


class NothingEmbedded(UsageError):
    """Not one vector could be made; `failed` says what was skipped and why."""

    def __init__(self, problem: str, failed: Sequence[Skipped], *, hint: str | None = None) -> None:
        super().__init__(problem, hint=hint)
        self.failed = tuple(failed)


@dataclass(frozen=True)
class Embeddings:
    """Vectors with what each stands for.

    rows        empty when the vectors went to a file: `read()` brings both back
    vectors_ND  float32, one row each; (0, D) when they went to a file
    count, dim  how many were made, and their width
    to          the file, None where they are in memory
    about       model, hash, recipe and how the vectors were made; stored in the file too
    failed      files that gave nothing; `damaged`: videos of which only the part before a fault was read
    """

    rows: tuple[Row, ...]
    vectors_ND: np.ndarray
    count: int
    dim: int
    to: Path | None
    about: dict[str, Any]
    failed: tuple[Skipped, ...] = ()
    damaged: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return self.count

    @property
    def ok(self) -> bool:
        """False when something could not be read: the command then exits with a status above 0."""
        return not self.failed and not self.damaged

    def read(self) -> Embeddings:
        """The same with rows and vectors in memory."""
        if self.to is None:
            return self
        rows, vectors_ND, about = read_vectors(self.to)
        return Embeddings(
            tuple(rows), vectors_ND, len(rows), self.dim, None, about, self.failed, self.damaged
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "dim": self.dim,
            "to": None if self.to is None else str(self.to),
            **self.about,
            "failed": [one.to_json() for one in self.failed],
            "damaged": [one.to_json() for one in self.damaged],
            "ok": self.ok,
        }

    def __str__(self) -> str:
        where = "" if self.to is None else f" in {printable(self.to)}"
        lines = [f"{self.count} vectors of {self.dim} numbers{where} (model {self.about['model']})."]
        lines += summary(self.failed, "could not be read")
        lines += summary(self.damaged, "are damaged; what comes before the fault was used")
        return "\n".join(lines)


@dataclass
class _Run:
    model: Model
    batch_size: int
    frames: int | None
    normalize: bool
    truncate: bool
    every: float | None
    on_progress: Progress | None
    total: float | None = None
    done: int = 0
    failed: list[Skipped] = field(default_factory=list)
    damaged: list[Skipped] = field(default_factory=list)

    def tell(self, steps: int, note: str) -> None:
        self.done += steps
        if self.on_progress is not None:
            self.on_progress(self.done, self.total, note)

    def skip(self, one: Skipped) -> None:
        self.failed.append(one)
        self.tell(1, one.path)

    # Each of these yields rows and their vectors_ND, batch by batch.

    def media(self, found: Sequence[Found]) -> Iterator[tuple[list[Row], np.ndarray]]:
        whole = [one for one in found if one.kind == "picture" or self.every is None]
        items = ((index, str(one.path), Clip(one.path)) for index, one in enumerate(whole))
        for group, vectors_ND in embed_media(
            self.model,
            items,
            batch_size=self.batch_size,
            frames=self.frames,
            normalize=self.normalize,
            on_skip=lambda index, one: self.skip(one),
        ):
            rows = [Row(look.kind, name, None, look.span.start, look.span.end) for _, name, look in group]
            self.tell(len(rows), group[-1][1])
            yield rows, vectors_ND
        for one in found:
            if one.kind == "video" and self.every is not None:
                yield from self._frames(one.path, self.every)

    def _frames(self, path: Path, every: float) -> Iterator[tuple[list[Row], np.ndarray]]:
        """A row per sampled frame. A video that breaks keeps the rows it has given."""
        from moviola.media import Video

        made = 0
        try:
            with Video(path) as video:
                side = self.model.preprocess.decode_hint
                for batch in video.stream(every=every, short_side=side, batch=self.batch_size):
                    vectors_TD = self.model.embed_frames(
                        batch.frames_THWC, batch_size=self.batch_size, normalize=self.normalize
                    )
                    finite_T = np.isfinite(vectors_TD).all(axis=1)
                    times = batch.times_T[finite_T].tolist()
                    made += len(times)
                    if times:
                        yield [Row("frame", str(path), None, t, t) for t in times], vectors_TD[finite_T]
                damage = video.damage
        except MediaError as error:
            if made == 0:
                self.skip(Skipped(str(path), error.reason))
                return
            damage = error.reason
        if made == 0:
            self.skip(Skipped(str(path), "the model gave no finite vector for it"))
            return
        if damage:
            self.damaged.append(Skipped(str(path), damage))
        self.tell(1, str(path))

    def texts(self, texts: Iterator[str]) -> Iterator[tuple[list[Row], np.ndarray]]:
        while chunk := list(islice(texts, _TEXTS)):
            vectors_ND = self.model.embed_texts(chunk, normalize=self.normalize, truncate=self.truncate)
            self.tell(len(chunk), chunk[-1])
            yield [Row("text", text=text) for text in chunk], vectors_ND


def embed(
    files: str | Path | Sequence[str | Path] | None = None,
    *,
    texts: str | Sequence[str] | None = None,
    text_file: str | Path | None = None,
    to: str | Path | None = None,
    model: str | Path | Model = "builtin",
    device: str = "auto",
    dtype: Dtype | None = None,
    tokenizer: str | Path | None = None,
    batch_size: int = 32,
    normalize: bool = True,
    truncate: bool = False,
    every: float | None = None,
    frames: int | None = None,
    on_progress: Progress | None = None,
) -> Embeddings:
    """Vectors of pictures and videos (files or folders), and of texts.

    texts, text_file  texts as given; the lines of a UTF-8 file, blank ones left out
    to                `.parquet` (columns kind, file, text, start, end, vector) or `.npy` with a
                      `.npy.json` beside it; None returns the vectors
    normalize         rows of length one
    truncate          cut texts longer than the model's context, with a warning, instead of refusing
    every             a row per frame of a video, this many seconds apart, instead of one per video
    frames            frames that make a video's vector where the model takes any number (12)

    The order: texts, pictures and videos as they are found, then the frames of `every`. A file that
    cannot be read is left out and stands in `failed`; `NothingEmbedded` if none could. A model that is
    loaded already keeps its device and dtype.
    """
    if files is None and texts is None and text_file is None:
        raise UsageError(
            "There is nothing to embed.", hint="Name files or folders, texts=, or text_file= (--text-file)."
        )
    if every is not None and not 0.01 <= every <= 3600:
        raise UsageError(f"every takes seconds between 0.01 and 3600, got {every:g}.")
    if batch_size < 1:
        raise UsageError(f"The batch size must be at least 1, got {batch_size}.")
    if frames is not None and frames < 1:
        raise UsageError(f"A video's vector needs at least one frame, got frames={frames}.")
    lines = [texts] if isinstance(texts, str) else list(texts or ())
    if any(not line.strip() for line in lines):
        raise UsageError("One of the texts is empty.", hint="Leave it out.")
    if text_file is not None:
        lines += read_lines(text_file)
    loaded = resolve(model, device=device, dtype=dtype, tokenizer=tokenizer)
    if loaded.adaptation == "classifier":
        raise Refusal(
            f"The model '{loaded.name}' only adds a classifier; its vectors are those of its base.",
            hint="Embed with the base model.",
        )
    run = _Run(loaded, batch_size, frames, normalize, truncate, every, on_progress)
    found = _walk(files, run.failed) if files is not None else []
    run.total = len(found) + len(lines)
    about = {
        "model": loaded.name,
        "hash": loaded.hash,
        "system": loaded.system,
        "dim": loaded.dim,
        "recipe": loaded.recipe.to_json(),
        "recipe_hash": loaded.recipe.hash,
        "logit_scale": loaded.logit_scale,
        "normalized": normalize,
        "every": every,
        "frames": frames,
    }
    memory = _Memory()
    count = 0
    with memory if to is None else sink_for(to, loaded.dim, about) as sink:
        # texts first: one that is too long is then found before hours of video are embedded
        for rows, vectors_ND in chain(run.texts(iter(lines)), run.media(found)):
            sink.add(rows, vectors_ND)
            count += len(rows)
        if count == 0:
            raise _nothing(run.failed, files is not None)
    vectors = np.concatenate(memory.vectors) if memory.vectors else np.empty((0, loaded.dim), np.float32)
    return Embeddings(
        tuple(memory.rows),
        vectors,
        count,
        loaded.dim,
        None if to is None else Path(to),
        about,
        tuple(run.failed),
        tuple(run.damaged),
    )


class _Memory(Sink):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.vectors: list[np.ndarray] = []

    def __enter__(self) -> _Memory:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to close."""

    def add(self, rows: Sequence[Row], vectors_ND: np.ndarray) -> None:
        self.rows += rows
        self.vectors.append(vectors_ND)


def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 file, stripped, blank ones left out."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"The text file {printable(path)} does not exist.", hint="Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The text file {printable(path)} cannot be read ({error}).") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"The text file {printable(path)} holds no text.")
    return lines


def _walk(files: str | Path | Sequence[str | Path], failed: list[Skipped]) -> list[Found]:
    from moviola.media import walk

    return list(walk(files, on_skip=lambda path, reason: failed.append(Skipped(str(path), reason))))


def _nothing(failed: Sequence[Skipped], asked: bool) -> NothingEmbedded:
    if failed:
        return NothingEmbedded(
            f"Nothing was embedded: none of the {len(failed)} files could be read. The first: {failed[0]}.",
            failed,
        )
    return NothingEmbedded(
        "Nothing was embedded: there are no pictures or videos under the given paths."
        if asked
        else "Nothing was embedded: no text was given.",
        failed,
        hint="Name files like .jpg or .mp4, or a folder that holds some." if asked else "Give at least one.",
    )
