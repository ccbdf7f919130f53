"""Stateless random numbers that depend only on (seed, epoch, sample), so there is no state to save or restore.

The stream of each sample is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), started at a hash of seed, epoch and
sample.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample_bits(seed: int, epoch: int, samples: Int64, words: range) -> NDArray[np.uint64]:
    """Return the given range of each sample's infinite stream of random 64-bit words: uint64 [B, len(words)]."""
    state = _mix(_key(seed, epoch) ^ (samples.astype(np.uint64) * _GOLDEN))
    return _mix(state[:, None] + _GOLDEN * np.arange(words.start + 1, words.stop + 1, dtype=np.uint64))


@lru_cache(maxsize=2)
def _key(seed: int, epoch: int) -> NDArray[np.uint64]:
    key = _mix(np.array([seed], np.uint64) + _GOLDEN)
    return _mix(key ^ _mix(np.array([epoch], np.uint64) + _GOLDEN * np.array([2], np.uint64)))


def uniforms(bits: NDArray[np.uint64]) -> Float64:
    """Map 64-bit words to [0, 1), 53 bits each."""
    result: Float64 = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


def generator(seed: int, epoch: int, stream: int, position: int = 0) -> np.random.Generator:
    """Return a NumPy generator for the draws of an epoch or a batch; equal arguments give equal draws."""
    key: Any = np.array([seed, epoch], np.uint64)
    counter: Any = np.array([0, 0, position, stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
