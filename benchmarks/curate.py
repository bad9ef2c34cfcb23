"""Metadata matching against pyahocorasick, and a whole curation run: `python benchmarks/curate.py [part]`.

Texts are made of words with a Zipf law; the metadata are 500,000 entries, most of several words. Parts:

`match`   one thread: our matcher against pyahocorasick's `iter` with a set of ids per text, the way the
          authors' code does it; both end in the same integer arrays, which are compared. Time to build,
          memory that stays, texts a second.
`run`     `curate` from Parquet to Parquet with one and two workers: rows a second, and peak memory of
          1 and of 20 million rows (`--rows`, `--large`).
`plain`   the authors' first matcher (`entry in text`) on a few texts, for scale.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

VOCABULARY, ENTRIES = 200_000, 500_000
GLUE = np.array([", and", " of the", ".", " -", " with"])


def words(seed: int) -> list[str]:
    """Distinct made words of 3 to 10 letters."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 11, VOCABULARY + 20_000)
    letters = generator.integers(97, 123, int(lengths.sum()), dtype=np.uint8).tobytes().decode()
    ends = np.cumsum(lengths)
    made = [letters[a:b] for a, b in zip((ends - lengths).tolist(), ends.tolist(), strict=True)]
    return list(dict.fromkeys(made))[:VOCABULARY]


class Zipf:
    """Draws word numbers with chance 1 / rank."""

    def __init__(self, size: int = VOCABULARY) -> None:
        self.cumulative = np.cumsum(1 / np.arange(1, size + 1))

    def __call__(self, generator: np.random.Generator, count: int) -> np.ndarray:
        return np.searchsorted(self.cumulative, generator.random(count) * self.cumulative[-1])


def metadata(vocabulary: list[str], seed: int) -> list[str]:
    """150,000 words and 350,000 phrases of two to four words, half of them of frequent words."""
    generator, zipf = np.random.default_rng(seed), Zipf()
    entries = dict.fromkeys(vocabulary[:150_000])
    while len(entries) < ENTRIES:
        sizes = generator.choice([2, 3, 4], 20_000, p=[0.7, 0.2, 0.1]).tolist()
        frequent = zipf(generator, 80_000).reshape(-1, 4).tolist()
        even = generator.integers(0, VOCABULARY, (20_000, 4)).tolist()
        for row in (frequent, even):
            entries.update(
                (" ".join(vocabulary[i] for i in r[:n]), None) for r, n in zip(row, sizes, strict=True)
            )
    return list(entries)[:ENTRIES]


def texts(
    vocabulary: list[str], count: int, seed: int, *, known: float = 1.0, words_each: tuple[int, int] = (6, 20)
) -> pa.StringArray:
    """Alt-texts of 6 to 19 words; of `known` of them the words are in the vocabulary."""
    generator, zipf = np.random.default_rng(seed), Zipf(len(vocabulary))
    lengths = generator.integers(*words_each, count)
    drawn = zipf(generator, int(lengths.sum()))
    tokens = pa.array(vocabulary).take(pa.array(drawn))
    if known < 1:
        strange = generator.random(len(drawn)) >= known
        tokens = pc.if_else(pa.array(strange), pc.binary_join_element_wise(tokens, "x", ""), tokens)
    lists = pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), tokens)
    tails = pa.array(GLUE).take(pa.array(generator.integers(0, len(GLUE), count)))
    return pc.binary_join_element_wise(pc.binary_join(lists, " "), tails, "")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def ours(entries: list[str]) -> Callable[[pa.StringArray], np.ndarray]:
    from moviola.data.matching import Matcher

    matcher = Matcher(entries)

    def run(array: pa.StringArray) -> np.ndarray:
        found = matcher(array)
        return (found.text_M << 32) | found.entry_M

    return run


def automaton(entries: list[str]) -> Callable[[pa.StringArray], np.ndarray]:
    import ahocorasick

    from moviola.data.matching import spacing

    made = ahocorasick.Automaton()
    for number, entry in enumerate(entries):
        made.add_word(f" {entry} ", number)
    made.make_automaton()

    def run(array: pa.StringArray) -> np.ndarray:
        numbers: list[int] = []
        sizes = []
        for text in array.to_pylist():
            found = {number for _, number in made.iter(spacing(text))}
            numbers += found
            sizes.append(len(found))
        text_M = np.repeat(np.arange(len(sizes)), sizes)
        return np.sort((text_M << 32) | np.array(numbers, np.int64))

    return run


def build_in_child(which: str, seed: int, connection: Any) -> None:
    """Build one matcher in a process of its own, so that what it holds can be seen."""
    entries = metadata(words(seed), seed)
    make = {"moviola": ours, "pyahocorasick": automaton}[which]
    if which == "moviola":
        import moviola.data.matching  # noqa: F401 - its import is not the matcher's memory
    before, start = resident(), time.perf_counter()
    kept = make(entries)
    connection.send((time.perf_counter() - start, resident() - before))
    del kept


def match(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"entries": ENTRIES, "texts": args.texts}
    for which in ("moviola", "pyahocorasick"):
        here, there = multiprocessing.get_context("spawn").Pipe()
        child = multiprocessing.get_context("spawn").Process(target=build_in_child, args=(which, 0, there))
        child.start()
        seconds, held = here.recv()
        child.join()
        result[which] = {"build seconds": round(seconds, 2), "MB held": round(held / 2**20)}
    vocabulary = words(0)
    entries = metadata(vocabulary, 0)
    runs = {"moviola": ours(entries), "pyahocorasick": automaton(entries)}
    for name, known in (("every word an entry", 1.0), ("a third of the words known", 1 / 3)):
        array = texts(vocabulary, args.texts, 1, known=known)
        found = {which: run(array.slice(0, 20_000)) for which, run in runs.items()}
        assert np.array_equal(*found.values()), "the matchers disagree"
        seconds = {which: [] for which in runs}
        for _ in range(args.repeats):  # side by side, so that a busy machine slows both
            for which, run in runs.items():
                start = time.process_time()
                key_M = run(array)
                seconds[which].append(time.process_time() - start)
        best = {which: statistics.median(s) for which, s in seconds.items()}
        result[name] = {
            "matches a text": round(len(key_M) / len(array), 1),
            **{f"{which} texts/s": round(len(array) / s) for which, s in best.items()},
            "ratio": round(best["pyahocorasick"] / best["moviola"], 2),
        }
    return result


def plain(args: argparse.Namespace) -> dict[str, Any]:
    from moviola.data.matching import spacing

    vocabulary = words(0)
    forms = [f" {entry} " for entry in metadata(vocabulary, 0)]
    some = texts(vocabulary, 20, 1).to_pylist()
    start = time.process_time()
    for text in some:
        spaced = spacing(text)
        [number for number, form in enumerate(forms) if form in spaced]
    return {"plain texts/s": round(len(some) / (time.process_time() - start), 1)}


HEADS = np.array(["photo of", "buy", "the", "vintage", "best", "image:", "my new", "stock photo,", "cheap"])


def wordnet_entries() -> list[str] | None:
    """WordNet's names with 0 to 99, in a fixed mixed order; None where the database is not there."""
    from moviola.data.wordnet import synset_names
    from moviola.types import UsageError

    try:
        names = [str(n) for n in range(100)] + [n for n in synset_names(Path("/usr/share/wordnet")) if n]
    except UsageError:
        return None
    names = list(dict.fromkeys(names))
    return [names[i] for i in np.random.default_rng(0).permutation(len(names))]


def make_pool(folder: Path, rows: int, vocabulary: list[str]) -> None:
    """Parquet files of a million rows: id, url, and a caption of a template and 2 to 7 Zipf-drawn entries.

    Two thirds of the drawn entries are made strange by a letter, so that much of a text matches nothing.
    """
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, rows, 1_000_000)):
        count = min(1_000_000, rows - start)
        ids = pa.array(np.arange(start, start + count)).cast(pa.string())
        captions = texts(vocabulary, count, 100 + number, known=1 / 3, words_each=(2, 8))
        heads = pa.array(HEADS).take(pa.array(np.random.default_rng(number).integers(0, len(HEADS), count)))
        captions = pc.binary_join_element_wise(heads, captions, " ")
        urls = pc.binary_join_element_wise("https://example.org/pictures/", ids, "")
        table = pa.table({"id": ids, "url": urls, "caption": captions})
        pq.write_table(table, folder / f"{number:05d}.parquet", compression="zstd", row_group_size=100_000)


def one_run(pool: str, to: str, listed: str, workers: int, connection: Any) -> None:
    from moviola.verbs.curate import curate

    start = time.perf_counter()
    made = curate(pool, metadata=listed, to=to, threshold=200, workers=workers)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = int(next(line for line in status if "VmHWM" in line).split()[1]) / 1024
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024 if workers > 1 else 0
    connection.send((time.perf_counter() - start, (peak, worker), dict(made.report)))


def run(args: argparse.Namespace) -> dict[str, Any]:
    work = Path(tempfile.mkdtemp(prefix="curate", dir=args.work))
    result: dict[str, Any] = {}
    try:
        listed = work / "metadata.json"
        entries = wordnet_entries() or metadata(words(0), 0)
        result["entries"] = len(entries)
        listed.write_text(json.dumps(entries))
        plan = [(args.rows, 1), (args.rows, 2)] + ([(args.large, 2)] if args.large else [])
        for rows, workers in plan:
            pool = work / f"pool{rows}"
            if not pool.exists():
                make_pool(pool, rows, entries)
            context = multiprocessing.get_context("spawn")
            here, there = context.Pipe()
            child = context.Process(
                target=one_run, args=(str(pool), str(work / "out"), str(listed), workers, there)
            )
            child.start()
            seconds, peak, report = here.recv()
            child.join()
            result[f"{rows:,} rows, {workers} workers"] = {
                "rows/s": round(rows / seconds),
                "seconds": round(seconds, 1),
                "peak MB, parent and largest worker": [round(p) for p in peak],
                "kept": report["kept"],
            }
            shutil.rmtree(work / "out")
    finally:
        shutil.rmtree(work)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="*", default=["match", "plain", "run"])
    parser.add_argument("--texts", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--large", type=int, default=0)
    parser.add_argument("--work", default=None, help="folder for the made pools")
    args = parser.parse_args()
    parts = {"match": match, "plain": plain, "run": run}
    for name in args.part:
        print(json.dumps({name: parts[name](args)}, indent=1), flush=True)


if __name__ == "__main__":
    main()
