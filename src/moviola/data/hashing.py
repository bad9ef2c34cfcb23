"""Random numbers that are a hash of (seed, item): the same on one core, many, or after a restart."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


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
