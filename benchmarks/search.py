"""Exact search over an index of 200,000 x 512 vectors against NumPy and FAISS flat, in one run.

    python benchmarks/search.py [--vectors 200000] [--dim 512] [--repeat 7] [--json]

Arms, each for one query:
  index     a Moviola index on disk, half precision: all scores, then the best 100
  numpy     a float32 matrix in memory: product, then argpartition
  faiss     IndexFlatIP over the same float32 matrix (left out where faiss is not installed)
Also: time to open the index and answer the first query in a new process (`moviola` imported lazily),
with its peak memory. Arms take turns; prints the best time of each and ratios; asserts only that the
arms agree.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moviola.store.format import ModelCard, Sampling
from moviola.store.index import Index
from moviola.store.scan import exact_scores
from moviola.store.writer import Writer

BEST = 100
_COLD = """
import sys, time
began = time.perf_counter()
import numpy as np
from moviola.store.index import Index
index = Index(sys.argv[1])
query = np.load(sys.argv[2])
scores = index.scores(query[None])[:, 0]
best = np.argpartition(-scores, 100)[:100]
seconds = time.perf_counter() - began
try:
    peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
except OSError:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(seconds, peak)
"""


def build(folder: Path, vectors: int, dim: int) -> np.ndarray:
    """An index of files with 1000 units each; the vectors as float32 in the index's order."""
    card = ModelCard("random", "0" * 16, "clip", "random", dim, "0" * 16, {})
    rng = np.random.default_rng(0)
    out = np.empty((vectors, dim), np.float32)
    with Writer(folder, card, Sampling()) as writer:
        for begin in range(0, vectors, 1000):
            part = out[begin : begin + 1000]
            part[:] = rng.standard_normal(part.shape, dtype=np.float32)
            part /= np.linalg.norm(part, axis=1, keepdims=True)
            path = b"/videos/%08d.mp4" % begin
            times = np.arange(len(part), dtype=float)
            writer.begin(path, size=1, mtime_ns=1, kind="video", duration=float(len(part)))
            writer.add_units(path, times, times, part, [b"\xff" * 3000] * len(part), np.zeros(len(part)))
            writer.finish(path)
            if writer.pending_rows >= 8192:
                writer.commit()
        writer.tidy()
    return out


def top(scores_N: np.ndarray) -> np.ndarray:
    best = np.argpartition(-scores_N, BEST)[:BEST]
    return best[np.argsort(-scores_N[best], kind="stable")]


def cast_product(halves_ND: np.ndarray, query_D: np.ndarray) -> np.ndarray:
    blocks = range(0, len(halves_ND), 4096)
    return np.concatenate([halves_ND[i : i + 4096].astype(np.float32) @ query_D for i in blocks])


def timed(
    arms: dict[str, Callable[[], np.ndarray]], repeat: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Best seconds and result of each arm. Arms take turns, so that other work on the machine hits all."""
    results = {name: run() for name, run in arms.items()}
    best = dict.fromkeys(arms, float("inf"))
    for _ in range(repeat):
        for name, run in arms.items():
            began = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - began)
    return best, results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "index"
        vectors_ND = build(folder, args.vectors, args.dim)
        query_D = vectors_ND[args.vectors // 3] + 0.5 * vectors_ND[args.vectors // 2]
        query_D /= np.linalg.norm(query_D)
        np.save(Path(scratch) / "query.npy", query_D)
        index = Index(folder)
        halves_ND = vectors_ND.astype(np.float16)
        arms: dict[str, Callable[[], np.ndarray]] = {
            "index": lambda: top(index.scores(query_D[None])[:, 0]),
            "index, one thread": lambda: top(exact_scores(index._chunks, query_D[None], threads=1)[:, 0]),
            "numpy float16, cast by NumPy": lambda: top(cast_product(halves_ND, query_D)),
            "numpy float32 in memory": lambda: top(vectors_ND @ query_D),
        }
        if importlib.util.find_spec("faiss"):
            import faiss

            flat = faiss.IndexFlatIP(args.dim)
            flat.add(vectors_ND)
            arms["faiss IndexFlatIP"] = lambda: flat.search(query_D[None], BEST)[1][0]
        seconds, results = timed(arms, args.repeat)
        ours = results["index"]
        agree = {
            name: len(set(ours.tolist()) & set(other.tolist())) / BEST for name, other in results.items()
        }
        command = [sys.executable, "-c", _COLD, str(folder), str(Path(scratch) / "query.npy")]
        cold = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        result = {
            "vectors": args.vectors,
            "dim": args.dim,
            "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
            "seconds": seconds,
            "ratio_to_index": {name: value / seconds["index"] for name, value in seconds.items()},
            "same_best_100": agree,
            "new_process_first_answer_seconds": float(cold[0]),
            "new_process_peak_mb": float(cold[1]),
            "index_bytes": index.bytes_on_disk,
        }
    assert ours[0] == args.vectors // 3, "the planted vector must come first"
    assert min(agree.values()) >= 0.97, agree
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{args.vectors} x {args.dim}, best {BEST} of one query, best of {args.repeat}")
    for name, value in seconds.items():
        print(f"  {name:30s} {1000 * value:8.1f} ms   x{value / seconds['index']:.2f}")
    print(f"  share of the same best {BEST}: {agree}")
    print(f"  new process to first answer: {float(cold[0]):.2f} s, peak {float(cold[1]):.0f} MB")


if __name__ == "__main__":
    main()
