"""Exact scores of every stored vector for a few queries, straight from half precision.

Searching is reading: 200,000 vectors of 512 halves are 200 MB, and a plain product over them is
bound by memory. NumPy turns halves into floats one at a time (0.2 s for those 200 MB), so the
conversion here is done on the bits, a cache-sized block at a time, and costs little beside the
product (0.04 s together; benchmarks/search.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# A block of converted vectors should stay in a core's own cache.
_BLOCK_BYTES = 512 << 10

# A half has 5 bits of exponent with bias 15, a float 8 bits with bias 127. Moving the 15 low bits up
# by 13 puts exponent and mantissa where a float has them, only 2^112 too small; the factor goes into
# the query, once. Sign extension plus the mask moves the sign. Zeros and subnormal halves come out
# right too; infinities and NaN would not, and are refused when vectors are written.
_KEEP = np.int32(-0x70002000)  # 0x8FFFE000: sign, exponent, mantissa
_SCALE = np.float32(2.0**112)


def exact_scores(
    chunks: Sequence[np.ndarray], queries_QD: np.ndarray, *, threads: int | None = None
) -> np.ndarray:
    """Dot products of stored vectors with queries: chunks of (n, D) float16, queries_QD -> (N, Q) float32.

    Rows come in the chunks' order. Memory: the result and half a megabyte per thread, whatever the
    index's size. `threads`: default all cores for large indexes.
    """
    scaled_DQ = np.ascontiguousarray(queries_QD.astype(np.float32).T) * _SCALE
    total = sum(len(chunk) for chunk in chunks)
    scores_NQ = np.empty((total, len(queries_QD)), dtype=np.float32)
    if total == 0:
        return scores_NQ
    width = queries_QD.shape[1]
    block = max(16, _BLOCK_BYTES // (4 * width))
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    at = 0
    for chunk in chunks:
        if chunk.dtype != np.float16 or chunk.shape[1:] != (width,):
            raise ValueError(f"expected float16 rows of {width}, got {chunk.dtype} {chunk.shape}")
        for begin in range(0, len(chunk), block * 64):
            piece = chunk[begin : begin + block * 64]
            pieces.append((piece, scores_NQ[at : at + len(piece)]))
            at += len(piece)

    def run(piece: tuple[np.ndarray, np.ndarray]) -> None:
        halves_ND, out_NQ = piece
        bits_BD = np.empty((min(block, len(halves_ND)), width), dtype=np.int32)
        for begin in range(0, len(halves_ND), block):
            part = halves_ND[begin : begin + block].view(np.int16)
            bits = bits_BD[: len(part)]
            bits[...] = part
            bits <<= 13
            bits &= _KEEP
            np.matmul(bits.view(np.float32), scaled_DQ, out=out_NQ[begin : begin + len(part)])

    workers = threads or min(len(pieces), os.cpu_count() or 1)
    if workers <= 1 or total * width < 4_000_000:
        for one in pieces:
            run(one)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(run, pieces))
    return scores_NQ


def to_halves(vectors_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors as they are stored: unit vectors in half precision, and their former lengths.

    A zero vector stays zero with length 0. `ValueError` for anything that is not finite.
    """
    vectors_ND = np.asarray(vectors_ND, dtype=np.float32)
    if not np.isfinite(vectors_ND).all():
        raise ValueError("the model gave values that are not finite numbers")
    norm_N = np.linalg.norm(vectors_ND, axis=1).astype(np.float32)
    unit_ND = vectors_ND / np.maximum(norm_N, np.finfo(np.float32).tiny)[:, None]
    return unit_ND.astype(np.float16), norm_N
