"""X-Pool ranking of N texts against M videos: the exact fast form against the written-out one.

    python benchmarks/rank.py [--texts 1000] [--videos 1000] [--heads 1] [--plain-texts 100] [--json]

Both run in this process with the same weights, features and threads. The written-out form is timed on
`--plain-texts` of the texts, in chunks of videos so that its N x M x D tensor fits, and its time is
scaled up to all texts (said in the output); `--plain-texts` equal to `--texts` times it whole. Also
timed: softmax pooling without parameters in both forms, and mean pooling. Prints ratios, asserts none.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moviola.clip.model import mean_of_frames
from moviola.parts.pooling import cosine_scores, pooler_scores, softmax_pool, softmax_pool_scores
from moviola.systems.retrieval.xpool import Pooler

CHUNK = 50  # videos per chunk of the written-out forms


def timed(run: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """The best wall time of a few runs, and the result."""
    best, result = float("inf"), torch.empty(0)
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - start)
    return best, result


def in_chunks(frames_MTD: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([score(part) for part in frames_MTD.split(CHUNK)], dim=1)


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    pooler = Pooler(args.width, args.heads).eval()
    for parameter in pooler.parameters():
        nn.init.normal_(parameter, std=args.width**-0.5 if parameter.ndim == 2 else 0.3)
    text_ND = torch.randn(args.texts, args.width)
    frames_MTD = torch.randn(args.videos, args.frames, args.width)
    few_nD, scale = text_ND[: args.plain_texts], args.texts / args.plain_texts
    unit_nD = nn.functional.normalize(few_nD, dim=-1)
    unit_MTD = nn.functional.normalize(frames_MTD, dim=-1)

    pooler_scores(text_ND[:50], frames_MTD[:50], pooler.weights())  # warm up
    fast, fast_NM = timed(lambda: pooler_scores(text_ND, frames_MTD, pooler.weights()), args.repeats)
    plain, plain_nM = timed(
        lambda: in_chunks(frames_MTD, lambda part: cosine_scores(few_nD, pooler(few_nD, part))), args.repeats
    )
    soft_fast, soft_NM = timed(lambda: softmax_pool_scores(text_ND, frames_MTD, 0.01), args.repeats)
    soft_plain, soft_nM = timed(
        lambda: in_chunks(unit_MTD, lambda part: cosine_scores(unit_nD, softmax_pool(unit_nD, part, 0.01))),
        args.repeats,
    )
    mean, _ = timed(lambda: cosine_scores(text_ND, mean_of_frames(frames_MTD)), args.repeats)
    exact_nM = in_chunks(
        frames_MTD[:CHUNK].double(),
        lambda part: cosine_scores(few_nD.double(), pooler.double()(few_nD.double(), part)),
    )
    return {
        "texts": args.texts,
        "videos": args.videos,
        "frames": args.frames,
        "width": args.width,
        "heads": args.heads,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "plain_measured_on_texts": args.plain_texts,
        "plain_is_extrapolated": args.plain_texts < args.texts,
        "xpool_fast_s": fast,
        "xpool_plain_s": plain * scale,
        "xpool_ratio": plain * scale / fast,
        "softmax_fast_s": soft_fast,
        "softmax_plain_s": soft_plain * scale,
        "softmax_ratio": soft_plain * scale / soft_fast,
        "mean_pooling_s": mean,
        "largest_difference_fast_plain": float((fast_NM[: args.plain_texts] - plain_nM).abs().max()),
        "largest_difference_softmax": float((soft_NM[: args.plain_texts] - soft_nM).abs().max()),
        "largest_error_fast_to_float64": float((fast_NM[: args.plain_texts, :CHUNK] - exact_nM).abs().max()),
        "largest_error_plain_to_float64": float((plain_nM[:, :CHUNK] - exact_nM).abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--videos", type=int, default=1000)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--plain-texts", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.plain_texts = min(args.plain_texts, args.texts)
    got = measure(args)
    if args.json:
        print(json.dumps(got, indent=1))
        return
    how = f"extrapolated from {args.plain_texts} texts" if got["plain_is_extrapolated"] else "measured whole"
    print(
        f"{args.texts} texts x {args.videos} videos, {args.frames} frames, width {args.width}, "
        f"{args.heads} head{'s' if args.heads > 1 else ''}"
    )
    print(f"{got['threads']} threads, {got['machine']}; written-out forms {how}")
    for name in ("xpool", "softmax"):
        print(
            f"{name:8} fast {got[f'{name}_fast_s']:7.2f} s   plain {got[f'{name}_plain_s']:7.2f} s   "
            f"ratio {got[f'{name}_ratio']:.1f}x"
        )
    print(f"mean     {got['mean_pooling_s']:12.2f} s")
    print(f"largest difference fast to plain: {got['largest_difference_fast_plain']:.1e}")


if __name__ == "__main__":
    main()
