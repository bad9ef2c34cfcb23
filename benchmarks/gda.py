"""GDA-CLIP's closed form against the formula as released (torch.cov, torch.linalg.pinv, float32), one run.

    python benchmarks/gda.py [--classes 1000] [--shots 16] [--few 20] [--repeats 1] [--json]

For each width (512 and 1024): C classes of `--shots` unit vectors, and `--few` classes, where N < D. Arms:
  released   class means, centred rows, torch.cov twice, a D x D pseudo-inverse, W and b; no choice of alpha
  ours       means, ridge and W by Cholesky or Woodbury, float64
  ours + cv  the same with alpha by cross-validation over five folds, folded with the zero-shot weights
Peak memory is what each arm adds to its process at most (a new process an arm). Prints ratios, asserts none.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from moviola.parts.discriminant import GaussianFitter
from moviola.systems.adaptation.gda_clip import fit

ARMS = ("released", "ours", "ours + cv")
WIDTHS = (512, 1024)


def released(vectors_ND: np.ndarray, labels_N: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The formula, plainly, in float32: W = D pinv((N - 1) Sigma + trace(Sigma) I) mu^T, and b."""
    x_ND, label_N = torch.from_numpy(vectors_ND), torch.from_numpy(labels_N)
    mean_CD = torch.stack([x_ND[label_N == c].mean(0) for c in range(classes)])
    centred_ND = torch.cat([x_ND[label_N == c] - mean_CD[c] for c in range(classes)])
    count, dim = centred_ND.shape
    ridge_DD = centred_ND.T.cov().trace() * torch.eye(dim)
    precision_DD = dim * torch.linalg.pinv((count - 1) * centred_ND.T.cov() + ridge_DD)
    weight_DC = precision_DD @ mean_CD.T
    bias_C = -torch.tensor(float(classes)).log() - (mean_CD.T * weight_DC).sum(0) / 2
    return weight_DC.numpy(), bias_C.numpy()


def made(classes: int, shots: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mean_CD = rng.standard_normal((classes, dim), dtype=np.float32)
    labels_N = np.repeat(np.arange(classes), shots)
    scale_D = (1 + np.arange(dim, dtype=np.float32)) ** -0.3 * 6
    vectors_ND = mean_CD[labels_N] + rng.standard_normal((len(labels_N), dim), dtype=np.float32) * scale_D
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    text_CD = mean_CD + rng.standard_normal(mean_CD.shape, dtype=np.float32)
    return vectors_ND, labels_N, text_CD / np.linalg.norm(text_CD, axis=1, keepdims=True)


def resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def run_arm(arm: str, classes: int, shots: int, dim: int, repeats: int) -> dict[str, object]:
    """Seconds of the best run and the most megabytes above the start, sampled every millisecond."""
    torch.linalg.pinv(torch.eye(8))  # the libraries' own start is not counted
    GaussianFitter(*made(2, 4, 8)[:2], 2).fit(np.full(2, 0.5))
    vectors_ND, labels_N, text_CD = made(classes, shots, dim)
    start, most, done = resident_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        if arm == "released":
            weight_DC, bias_C = released(vectors_ND, labels_N, classes)
        elif arm == "ours":
            got = GaussianFitter(vectors_ND, labels_N, classes).fit(np.full(classes, 1 / classes))
            weight_DC, bias_C = got.weight_DC, got.bias_C
        else:
            head = fit(vectors_ND, labels_N, text_CD, logit_scale=100.0)
            assert head.gaussians is not None
            weight_DC, bias_C = head.gaussians.weight_DC, head.gaussians.bias_C
        best = min(best, time.perf_counter() - began)
    done.set()
    watcher.join()
    exact = GaussianFitter(vectors_ND, labels_N, classes, form="pinv").fit(np.full(classes, 1 / classes))
    error = float(np.abs(weight_DC - exact.weight_DC).max() / np.abs(exact.weight_DC).max())
    return {
        "seconds": best,
        "peak_mb": max(most[0] - start, 0.0),
        "error": error,
        "bias": float(bias_C.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--few", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        arm, classes, dim = args.arm
        print(json.dumps(run_arm(arm, int(classes), args.shots, int(dim), args.repeats)))
        return
    rows = []
    for classes in (args.classes, args.few):
        for dim in WIDTHS:
            own = [sys.executable, __file__, "--shots", str(args.shots), "--repeats", str(args.repeats)]
            for arm in ARMS:
                done = subprocess.run(
                    [*own, "--arm", arm, str(classes), str(dim)], capture_output=True, text=True, check=True
                )
                got = json.loads(done.stdout.splitlines()[-1])
                rows.append({"classes": classes, "shots": args.shots, "dim": dim, "arm": arm, **got})
    if args.json:
        print(json.dumps({"torch": torch.__version__, "machine": platform.machine(), "rows": rows}, indent=1))
        return
    print(f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}")
    for row, base in zip(rows, [rows[n - n % 3] for n in range(len(rows))], strict=True):
        print(
            f"C {row['classes']:5} x {row['shots']} shots, D {row['dim']:5}  {row['arm']:10} "
            f"{row['seconds']:8.3f} s {base['seconds'] / row['seconds']:7.1f}x   {row['peak_mb']:7.1f} MB   "
            f"error of W {row['error']:.1e}"
        )


if __name__ == "__main__":
    main()
