"""Random numbers that are a hash of (seed, item): the same on one core, many, or after a restart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser over uint64 (Steele, Lea and Flood 2014): a bijection that avalanches."""
    z = values.astype(np.uint64)
    with np.errstate(over="ignore"):
        z = z + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def hash_uint64(seed: int, ids: np.ndarray, stream: int = 0) -> np.ndarray:
    """One uint64 per id; `stream` separates independent uses of the same (seed, id)."""
    key = mix(mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64)) ^ np.uint64(stream & 0xFFFFFFFFFFFFFFFF))
    return mix(mix(np.asarray(ids).astype(np.uint64)) ^ key)


def hash_uniform(seed: int, ids: np.ndarray, stream: int = 0) -> np.ndarray:
    """Uniform float64 in [0, 1), one per id, with 53 random bits.

    >>> hash_uniform(0, np.array([1, 2])).tolist() == hash_uniform(0, np.array([2, 1])).tolist()[::-1]
    True
    """
    return (hash_uint64(seed, ids, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` rows in an epoch: a sort by hash, so it needs no state to resume."""
    return np.argsort(hash_uint64(seed, np.arange(count, dtype=np.uint64), stream=epoch), kind="stable")


def eight_bytes(words: np.ndarray, start_K: np.ndarray, left_K: np.ndarray) -> np.ndarray:
    """Up to eight bytes from each place as little-endian uint64, zeros after `left_K` (0 to 8) of them.

    `words` are the bytes as uint64, with at least one word more than any place reaches.
    """
    place_K = start_K >> 3
    shift_K = ((start_K & 7) << 3).view(np.uint64)
    low_K = words[place_K] >> shift_K
    high_K = (words[place_K + 1] << np.uint64(1)) << (np.uint64(63) - shift_K)
    return (low_K | high_K) & _FIRST_BYTES[left_K]


def as_words(data: bytes | memoryview) -> np.ndarray:
    """Bytes as little-endian uint64, zeros behind them: what `eight_bytes` reads from."""
    return np.frombuffer(bytes(data) + bytes(24 - len(data) % 8), "<u8")


def hash_strings(strings: pa.StringArray) -> np.ndarray:
    """One uint64 per string, a function of its UTF-8 bytes alone; a null counts as "".

    >>> import pyarrow as pa
    >>> int(hash_strings(pa.array(["a", "b"]))[1]) == int(hash_strings(pa.array(["b"]))[0])
    True
    """
    import pyarrow as pa

    if not len(strings):
        return np.empty(0, np.uint64)
    fixed = strings.cast(pa.large_string()).fill_null("")
    _, offsets, data = fixed.buffers()
    ends = np.frombuffer(offsets, np.int64)[fixed.offset : fixed.offset + len(fixed) + 1]
    first, last = int(ends[0]), int(ends[-1])
    words = as_words(memoryview(data)[first:last] if data is not None else b"")
    start_N, length_N = ends[:-1] - first, np.diff(ends)
    hash_N = mix(length_N.astype(np.uint64))
    alive = np.arange(len(fixed))
    for done in range(0, int(length_N.max()) if len(length_N) else 0, 8):
        alive = alive[length_N[alive] > done]
        left = np.minimum(length_N[alive] - done, 8)
        hash_N[alive] = mix(hash_N[alive] ^ eight_bytes(words, start_N[alive] + done, left))
    return hash_N
