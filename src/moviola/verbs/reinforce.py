"""Reinforce pairs once, train on them as often as one likes (MobileCLIP's multi-modal reinforced training).

Teachers see every picture under several strong augmentations, and every caption; what they say is stored
with the pair. Training then distils from the teachers without running them.

A run lives beside its output, in `FOLDER.partial`, until it is whole: shard after shard, each written
whole and with a receipt. Killed at any moment, the same command goes on after the last finished shard.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moviola.types import Dtype, UsageError, printable

if TYPE_CHECKING:
    from moviola.clip.loaded import Model
    from moviola.data.reinforced import Manifest
    from moviola.data.reinforced_source import Source
    from moviola.verbs.reinforce_stages import Teaching

SHARD_ROWS = 512
OnProgress = Callable[[float, float | None, str], None]


@dataclass(frozen=True)
class Reinforced:
    """What a run left: the folder, its manifest, and the first rows that were left out, with the reason.

    `went_on`: how many shards an earlier run had finished.
    """

    folder: Path
    manifest: Manifest
    skipped: tuple[str, ...] = ()
    went_on: int = 0

    @property
    def ok(self) -> bool:
        """False where rows were left out."""
        return not self.manifest.counts["skipped"]

    def to_json(self) -> dict[str, Any]:
        from dataclasses import asdict

        return {
            "folder": str(self.folder),
            "rows": self.manifest.rows,
            "augmentations": self.manifest.augmentations,
            "teachers": [asdict(teacher) for teacher in self.manifest.teachers],
            "shards": len(self.manifest.shards),
            "counts": dict(self.manifest.counts),
            "synthetic": self.manifest.synthetic,
            "skipped": list(self.skipped),
        }

    def __str__(self) -> str:
        made, counts = self.manifest, self.manifest.counts
        names = " and ".join(f"{teacher.name} ({teacher.dim})" for teacher in made.teachers)
        lines = [
            f"{made.rows:,} pairs with {made.augmentations} augmentations each, by {names}, "
            f"in {len(made.shards)} shards in {printable(self.folder)}.",
            made.synthetic,
        ]
        if counts["cut"]:
            lines.append(f"{counts['cut']:,} captions were cut to a teacher's context.")
        total = sum(counts["skipped"].values())
        if total:
            lines.append(f"{total:,} rows were left out:")
            lines += [f"  {why}: {many:,}" for why, many in counts["skipped"].items()]
            lines += [f"  {one}" for one in self.skipped]
        return "\n".join(lines)


def reinforce(
    sources: str | Path | Sequence[str | Path],
    to: str | Path,
    *,
    teachers: str | Path | Model | Sequence[str | Path | Model] = "builtin",
    augmentations: int = 10,
    synthetic: str | Sequence[str] = (),
    image_column: str | None = None,
    text_columns: Sequence[str] = (),
    id_column: str | None = None,
    media_root: str | Path | None = None,
    area: tuple[float, float] = (0.08, 1.0),
    operations: int = 2,
    strength: float = 0.3,
    mirror: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    dtype: Dtype | None = None,
    batch_size: int = 64,
    shard_rows: int = SHARD_ROWS,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> Reinforced:
    """Store with each pair its augmentations and what the teachers say of each, and of each caption.

    sources       Parquet, CSV, TSV, JSON Lines, WebDataset tars: files, folders, globs
    teachers      one or several models with text; their vectors are normalised and put side by side
    augmentations of a picture, drawn by hash of (seed, id, index)
    synthetic     columns with captions from a captioner. Without them a training step draws another real
                  caption of the row in their place, or the same one where there is no other
    media_root    the folder of paths in a table; default: the table's own
    area, operations, strength, mirror   of the augmentations (see `data.augmentations.Augment`)
    threads       decode and augment ahead of the teachers; default: the cores, 8 at most

    Rows without a readable picture or without captions are left out and counted; of a file that is
    damaged, the rows before the damage are kept. Captions longer than a teacher's context are cut.
    Calling it again when it is whole gives the same set back. `UsageError` when `to` holds something
    else, or a run with other teachers, settings or files; and when no row was left.
    """
    from moviola.data.augmentations import Augment
    from moviola.verbs.reinforce_stages import Teaching, load_teachers

    chosen = [sources] if isinstance(sources, str | Path) else list(sources)
    if augmentations < 1:
        raise UsageError(f"A picture needs at least one augmentation, got {augmentations}.")
    for name, value in (("batch_size", batch_size), ("shard_rows", shard_rows), ("threads", threads or 1)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}.")
    augment = Augment((area[0], area[1]), operations=operations, strength=strength, mirror=mirror)
    columns = {
        "picture": image_column,
        "texts": tuple(text_columns),
        "synthetic": (synthetic,) if isinstance(synthetic, str) else tuple(synthetic),
        "id": id_column,
        "root": media_root,
    }
    opened = _open(chosen, Path(to), **columns)
    teaching = Teaching(
        load_teachers(teachers, device, dtype),
        augment=augment,
        augmentations=augmentations,
        seed=seed,
        batch_size=batch_size,
        threads=threads or min(8, os.cpu_count() or 1),
    )
    try:
        run = _Run(teaching, opened, Path(to), shard_rows=shard_rows, on_progress=on_progress)
        if run.to.exists() or run.to.is_symlink():
            return run.finished()
        with run.working():
            return run.run()
    finally:
        teaching.close()


# --------------------------------------------------------------------------------------------------
# Before it starts
# --------------------------------------------------------------------------------------------------


def _open(sources: Sequence[str | Path], to: Path, **columns: Any) -> list[Source]:
    """Every file's columns are looked at now: a wrong one must not show after hours."""
    from moviola.data.pairs import check_name, find_pairs
    from moviola.data.reinforced_source import Source

    check_name(to)
    for source in sources:
        if Path(source).is_dir() and to.resolve().is_relative_to(Path(source).resolve()):
            raise UsageError(
                f"{printable(to)} lies among the pairs, so a later run would read it as pairs.",
                hint="Choose a --to beside their folder.",
            )
    return [Source.open(file, **columns) for file in find_pairs(sources)]


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------


class _Run:
    def __init__(
        self,
        teaching: Teaching,
        sources: Sequence[Source],
        to: Path,
        *,
        shard_rows: int,
        on_progress: OnProgress | None,
    ) -> None:
        self.teaching, self.sources, self.to = teaching, sources, to
        self.shard_rows, self.on_progress = shard_rows, on_progress
        self.work = to.with_name(to.name + ".partial")
        self.out = self.work / "out"
        self.teachers = teaching.teachers
        self.settings = self._settings()
        self.done, self.total = 0, 0

    def _settings(self) -> dict[str, Any]:
        """What two runs must share to make one set; as JSON gives it back."""
        from moviola.data.reinforced import VERSION

        first = self.sources[0]
        return json.loads(
            json.dumps(
                {
                    "version": VERSION,
                    # names may change with the folder that a model lies in; its weights decide
                    "teachers": [[t.hash, t.dim, t.recipe, t.dtype] for t in self.teachers],
                    "augmentations": self.teaching.augmentations,
                    "augment": self.teaching.augment.to_json(),
                    "seed": self.teaching.seed,
                    "shard_rows": self.shard_rows,
                    "columns": [[s.pictures, s.texts, s.synthetic, s.id] for s in self.sources],
                    "files": [[s.file.name, *self._stat(s)] for s in self.sources],
                    "synthetic": first.synthetic,
                }
            )
        )

    @staticmethod
    def _stat(source: Source) -> tuple[int, int] | tuple[None, None]:
        try:
            stat = source.file.path.stat()
        except FileNotFoundError:
            return None, None
        return stat.st_size, stat.st_mtime_ns

    # ------------------------------------------------------------------------------ the work folder

    def finished(self) -> Reinforced:
        """The set at `to`, which this very run made before."""
        from moviola.data.reinforced import MANIFEST, open_reinforced

        if not (self.to / MANIFEST).exists():
            raise UsageError(
                f"{printable(self.to)} exists already and is no reinforced set.",
                hint="Choose another folder, or remove it.",
            )
        manifest, _ = open_reinforced(self.to)
        self._compare(manifest.settings, f"{printable(self.to)} holds a reinforced set")
        return Reinforced(self.to, manifest, tuple(manifest.counts["examples"]), len(manifest.shards))

    def _compare(self, before: Mapping[str, Any], what: str) -> None:
        if before.get("teachers") != self.settings["teachers"]:
            told = ", ".join(f"{t[0]} ({t[1]})" for t in before.get("teachers", ()))
            now = ", ".join(f"{t.hash} ({t.dim}, {t.name})" for t in self.teachers)
            raise UsageError(
                f"{what} of other teachers: weights {told} there, {now} here.",
                hint="Use the same teachers, or choose another --to.",
            )
        changed = sorted(name for name in self.settings if self.settings[name] != before.get(name))
        if changed:
            raise UsageError(
                f"{what} with other settings ({', '.join(changed)}).",
                hint="Run it as it was, choose another --to, or remove that folder.",
            )

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold the work folder: no other run has it, and what was finished there is of these settings."""
        from filelock import FileLock, Timeout

        from moviola.data.pairs import OutputError
        from moviola.files import atomic

        place = self.work / "run.json"
        try:
            if not place.exists() and any(self.work.glob("[!.]*")):
                raise UsageError(
                    f"{printable(self.work)} exists and is no unfinished run.", hint="Choose another --to."
                )
            self.out.mkdir(parents=True, exist_ok=True)
            with FileLock(self.work / ".lock", timeout=0):
                if place.exists():
                    before = json.loads(place.read_bytes())
                    self._compare(before, f"{printable(self.work)} holds an unfinished run")
                else:
                    with atomic(place) as file:
                        file.write(json.dumps(self.settings, indent=1).encode())
                for left in self.out.glob(".*.writing"):  # by a run that was killed
                    left.unlink()
                yield
        except Timeout as error:
            raise UsageError(
                f"Another run is writing {printable(self.to)}.", hint="Wait for it, or choose another --to."
            ) from error
        except OSError as error:  # reading has errors of its own
            raise OutputError(
                f"{printable(self.to)} could not be written ({error.strerror or error}).",
                hint="Put it right and run the same command again: finished shards are kept.",
            ) from error

    def _name(self, file: int, shard: int) -> str:
        return f"part-{file:05d}-{shard:05d}.parquet"

    def _receipt(self, file: int, shard: int) -> Path:
        return self.work / "done" / f"{file:05d}-{shard:05d}.json"

    def _receipts(self, file: int) -> list[dict[str, Any]]:
        """What is finished of a file: its first shards, in order."""
        found: list[dict[str, Any]] = []
        while (place := self._receipt(file, len(found))).exists():
            found.append(json.loads(place.read_bytes()))
        return found

    # ------------------------------------------------------------------------------------ the stages

    def run(self) -> Reinforced:
        """Go on after the last finished shard; then the folder takes its name."""
        counts = [source.count() for source in self.sources]
        self.total = sum(counts)
        before = [self._receipts(number) for number in range(len(self.sources))]
        went_on = sum(len(receipts) for receipts in before)
        self.done = sum(receipt["read"] for receipts in before for receipt in receipts)
        self._tell("")
        for number, source in enumerate(self.sources):
            self._file(number, source, before[number])
        return self._finish(went_on)

    def _tell(self, note: str) -> None:
        if self.on_progress is not None:
            self.on_progress(self.done, max(self.total, self.done), note)

    def _rows_done(self, many: int, note: str) -> None:
        self.done += many
        self._tell(note)

    def _file(self, number: int, source: Source, receipts: Sequence[Mapping[str, Any]]) -> None:
        from moviola.data.reinforced_source import DAMAGED
        from moviola.files import atomic
        from moviola.verbs.reinforce_stages import write_shard

        if receipts and DAMAGED in receipts[-1]["skipped"]:
            return
        rows = source.rows(len(receipts) * self.shard_rows)
        for shard, chunk in groupby(rows, lambda row: row.number // self.shard_rows):
            table, receipt = self.teaching.shard(chunk, self._rows_done)
            if table.num_rows:
                with atomic(self.out / self._name(number, shard)) as file:
                    write_shard(table, file)
            with atomic(self._receipt(number, shard)) as file:
                file.write(json.dumps(receipt).encode())
        told = self.settings["files"][number]
        if [*self._stat(source)] != told[1:]:
            raise UsageError(
                f"{printable(source.file.path)} changed during the run.",
                hint=f"Remove {printable(self.work)} and run again.",
            )

    # --------------------------------------------------------------------------------------- the end

    def _finish(self, went_on: int) -> Reinforced:
        import PIL
        import torch

        from moviola import __version__
        from moviola.data.reinforced import MANIFEST, Manifest
        from moviola.files import atomic
        from moviola.verbs.reinforce_stages import SHOWN, about_synthetic

        shards: list[tuple[str, int]] = []
        counts: dict[str, Any] = dict.fromkeys(
            ("read", "rows", "captions", "synthetic", "without_synthetic", "one_caption", "cut"), 0
        )
        skipped: dict[str, int] = {}
        examples: list[str] = []
        for number in range(len(self.sources)):
            for shard, receipt in enumerate(self._receipts(number)):
                for name in counts:
                    counts[name] += receipt[name]
                for why, many in receipt["skipped"].items():
                    skipped[why] = skipped.get(why, 0) + many
                examples += receipt["examples"][: SHOWN - len(examples)]
                if receipt["rows"]:
                    shards.append((self._name(number, shard), receipt["rows"]))
        if not shards:
            told = "; ".join(f"{why}: {many}" for why, many in skipped.items()) or "there are no rows"
            first = f" The first: {examples[0]}." if examples else ""
            shutil.rmtree(self.work)
            raise UsageError(
                f"Nothing was reinforced of {counts['read']} rows ({told}).{first}",
                hint="Check --image-column, --text-column and --media-root.",
            )
        manifest = Manifest(
            teachers=self.teachers,
            augmentations=self.teaching.augmentations,
            augment=self.teaching.augment,
            seed=self.teaching.seed,
            rows=counts.pop("rows"),
            shards=tuple(shards),
            counts={**counts, "skipped": skipped, "examples": examples},
            synthetic=about_synthetic(self.settings["synthetic"], counts),
            settings=self.settings,
            made_with={"moviola": __version__, "pillow": PIL.__version__, "torch": str(torch.__version__)},
        )
        with atomic(self.out / MANIFEST) as file:
            file.write(json.dumps(manifest.to_json(), indent=1).encode())
        self.out.replace(self.to)
        with suppress(OSError):  # the result is whole; what is left of the work is only in the way
            shutil.rmtree(self.work)
        return Reinforced(self.to, manifest, tuple(examples), went_on)
