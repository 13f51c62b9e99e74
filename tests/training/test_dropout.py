"""The generator of the dropout masks: a hash of the key and of the index of each element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import run_mlm_flax as script

RATE = 0.1


def key_of(seed: int):
    return jax.random.key(seed, impl=script.dropout_prng())


def mask(seed: int, *shape: int) -> np.ndarray:
    """What dropout drops, as Flax draws it."""
    return ~np.asarray(jax.random.bernoulli(key_of(seed), 1 - RATE, shape))


def murmur_mix(number: int) -> int:
    """The function fmix32 of MurmurHash3 for one number."""
    number ^= number >> 16
    number = number * 0x85EBCA6B % 2**32
    number ^= number >> 13
    number = number * 0xC2B2AE35 % 2**32
    return number ^ number >> 16


def test_the_bits_are_two_rounds_of_murmur_hash_over_key_and_index():
    key = key_of(7)
    first, second = np.asarray(jax.random.key_data(key)).tolist()
    bits = np.asarray(jax.random.bits(key, (3, 4, 5)))

    for index, found in enumerate(bits.flatten().tolist()):
        mixed = murmur_mix(index ^ first)
        assert found == murmur_mix((mixed + second) % 2**32)


def test_keys_are_split_and_folded_as_those_of_threefry():
    key = key_of(3)
    threefry = jax.random.key(3, impl="threefry2x32")
    for function in (jax.random.split, lambda key: jax.random.fold_in(key, 5)):
        found = jax.random.key_data(function(key))
        assert np.array_equal(found, jax.random.key_data(function(threefry)))


@pytest.mark.parametrize("bit_width", [8, 16])
def test_other_widths_are_those_of_threefry(bit_width):
    dtype = f"uint{bit_width}"
    found = jax.random.bits(key_of(3), (1000,), dtype)
    expected = jax.random.bits(jax.random.key(3, impl="threefry2x32"), (1000,), dtype)
    assert found.dtype == expected.dtype == dtype
    assert np.array_equal(found, expected)


def standard_score(count: int, trials: int, probability: float) -> float:
    """How many standard deviations of a binomial distribution `count` is from its mean."""
    mean = trials * probability
    return (count - mean) / np.sqrt(mean * (1 - probability))


@pytest.mark.parametrize("seed", range(5))
def test_the_rate_is_that_of_independent_draws(seed):
    dropped = mask(seed, 64, 128, 128)
    assert abs(standard_score(dropped.sum(), dropped.size, RATE)) < 4
    # Also in each row, column and plane.
    for axis in range(3):
        counts = np.moveaxis(dropped, axis, 0).reshape(dropped.shape[axis], -1).sum(axis=1)
        trials = dropped.size // counts.size
        scores = [standard_score(count, trials, RATE) for count in counts]
        assert 0.75 < np.std(scores) < 1.25
        assert np.abs(scores).max() < 5


@pytest.mark.parametrize("distance", [1, 2, 3, 64, 128, 4096, 128 * 128])
def test_elements_at_any_distance_are_independent(distance):
    dropped = mask(0, 64, 128, 128).flatten()
    both = dropped[distance:] & dropped[:-distance]
    assert abs(standard_score(both.sum(), both.size, RATE**2)) < 4


def test_masks_of_different_keys_are_independent():
    masks = [mask(seed, 128, 1024) for seed in range(12)]
    scores = []
    for number, one in enumerate(masks):
        for other in masks[:number]:
            scores.append(standard_score((one & other).sum(), one.size, RATE**2))
    assert 0.75 < np.std(scores) < 1.25
    assert np.abs(scores).max() < 4.5


def test_each_device_and_micro_batch_draws_its_own_mask():
    def draw(number):
        device = jax.lax.axis_index("batch")
        key = jax.random.fold_in(jax.random.fold_in(key_of(0), device), number)
        return jax.random.bernoulli(key, 1 - RATE, (64, 64))

    devices = jax.device_count()
    distinct = set()
    for number in (0, 1):
        masks = jax.pmap(draw, "batch")(jnp.full(devices, number))
        distinct |= {np.asarray(drawn).tobytes() for drawn in masks}
    assert len(distinct) == 2 * devices
