"""Tests of the random numbers drawn from (seed, epoch, sample)."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from metaformer.data.plan.draws import generator, sample_bits, uniforms

SAMPLES, COLUMNS = 20_000, 40
FROZEN_BITS = [[17497553626452280300, 17524493208449190109], [3086376450934695049, 696428993794639154]]
FROZEN_ORDER = [4, 2, 0, 5, 1, 6, 7, 3]
WORDS = st.integers(0, 2**63 - 1)


def drawn(seed: int = 3, epoch: int = 5) -> np.ndarray:
    return uniforms(sample_bits(seed, epoch, np.arange(SAMPLES), range(COLUMNS)))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=WORDS, epoch=WORDS, samples=st.lists(st.integers(0, 2**40), min_size=1, max_size=8))
def test_a_samples_draws_depend_on_no_other_sample(seed: int, epoch: int, samples: list[int]) -> None:
    """A sample's draws in [0, 1) are the same alone, in any batch, and when more draws are requested."""
    together = sample_bits(seed, epoch, np.array(samples), range(5))
    for row, sample in zip(together, samples, strict=True):
        assert np.array_equal(row, sample_bits(seed, epoch, np.array([sample]), range(9))[0, :5])
    assert ((uniforms(together) >= 0) & (uniforms(together) < 1)).all()


def test_extreme_words_stay_below_one() -> None:
    """The largest 64-bit word maps to less than 1, and the smallest to 0."""
    low, high = uniforms(np.array([0, 2**64 - 1], np.uint64))
    assert low == 0
    assert 1 - 2.0**-52 < high < 1


def test_draws_never_change_between_versions() -> None:
    """Frozen values guarantee that a run resumed with a later version of the code gets the same draws."""
    assert sample_bits(42, 3, np.array([0, 1_281_166]), range(2)).tolist() == FROZEN_BITS
    assert generator(42, 3, stream=1).permutation(8).tolist() == FROZEN_ORDER


def test_every_draw_is_uniform() -> None:
    """Each of 40 draws over 20,000 samples passes the Kolmogorov-Smirnov test at 5e-5."""
    grid = (np.arange(SAMPLES) + 0.5)[:, None] / SAMPLES
    assert np.abs(np.sort(drawn(), axis=0) - grid).max() < 2.3 / SAMPLES**0.5


def test_draws_are_independent() -> None:
    """No draw correlates with another draw of its sample, the next sample, the next epoch or the next seed."""
    here = drawn()
    columns = np.hstack([here, np.roll(here, 1, axis=0), drawn(epoch=6), drawn(seed=4), drawn(seed=5, epoch=3)])
    correlations = np.corrcoef(columns.T) - np.eye(5 * COLUMNS)
    assert np.abs(correlations).max() < 5.2 / SAMPLES**0.5  # for 20,000 pairs, exceeded by chance in 1 of 250 runs


def test_all_words_differ() -> None:
    """No 64-bit word repeats over samples, draws, epochs and seeds, even for small or swapped epochs and seeds."""
    words = [sample_bits(seed, epoch, np.arange(500), range(9)) for seed in range(5) for epoch in range(5)]
    assert len(np.unique(np.concatenate(words))) == 25 * 500 * 9


def test_generators_are_equal_for_equal_arguments_only() -> None:
    """Generators are reproducible, and share no words if seed, epoch, stream or position differ."""
    keys = [(0, 0, 1, 0), (1, 0, 1, 0), (0, 1, 1, 0), (0, 0, 2, 0), (0, 0, 1, 1), (0, 0, 1, 2)]
    words = [generator(*key).integers(2**63, size=1000) for key in keys]
    assert all(
        np.array_equal(w, generator(*key).integers(2**63, size=1000)) for w, key in zip(words, keys, strict=True)
    )
    assert len(np.unique(np.concatenate(words))) == 6000
