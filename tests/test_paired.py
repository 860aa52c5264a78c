"""Paired differences: the mean, what the interval covers, and that it covers it."""

from __future__ import annotations

import time

import numpy as np
import pytest

from sparseffn.errors import UserError
from sparseffn.stats import Difference, SeedNoise, difference, seed_noise


def correlated(generator: np.random.Generator, shape: tuple[int, ...], likeness: float) -> np.ndarray:
    """Normal numbers of variance 1, each like its left neighbour."""
    noise = generator.normal(size=shape)
    for i in range(1, shape[-1]):
        noise[..., i] = likeness * noise[..., i - 1] + (1 - likeness**2) ** 0.5 * noise[..., i]
    return noise


def drawn(generator: np.random.Generator, n_seeds: int, n_windows: int, seed_std: float, likeness: float) -> np.ndarray:
    """Differences of true mean 0: an effect of the seed, one of the text that all seeds share, one of both."""
    text, both = (correlated(generator, (n, n_windows), likeness) for n in (1, n_seeds))
    return seed_std * generator.normal(size=(n_seeds, 1)) + text + both


def against_zero(differences: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> Difference:
    """The interval of differences that are given as such."""
    ours = dict(enumerate(differences))
    return difference(ours, {s: np.zeros_like(row) for s, row in ours.items()}, resamples=resamples, seed=seed)


@pytest.mark.parametrize(
    ("n_seeds", "n_windows", "seed_std", "likeness"),
    [
        pytest.param(1, 100, 0.0, 0.0, id="one seed"),
        pytest.param(1, 400, 0.0, 0.5, id="like neighbours"),
        pytest.param(2, 200, 0.5, 0.5, id="two seeds"),
        pytest.param(3, 200, 0.5, 0.5, id="three seeds"),
        pytest.param(3, 200, 0.0, 0.5, id="seeds that are alike"),
        pytest.param(5, 200, 0.2, 0.5, id="five seeds"),
    ],
)
def test_interval_covers_the_truth_as_often_as_it_says(n_seeds: int, n_windows: int, seed_std: float, likeness: float) -> None:
    """Of 300 worlds without a difference, 91% to 100% lie in the interval (95% less three deviations of the count)."""
    generator = np.random.default_rng(n_seeds)
    worlds = [drawn(generator, n_seeds, n_windows, seed_std, likeness) for _ in range(300)]
    found = [against_zero(world, resamples=400) for world in worlds]
    assert sum(f.low <= 0 <= f.high for f in found) / len(found) >= 0.91


@pytest.mark.parametrize("n_seeds", [1, 2, 3])
def test_interval_with_pooled_noise_covers_the_truth(n_seeds: int) -> None:
    """Of 300 tables of six equal methods, whose seeds scatter alone and together, the first two differ in 3% to 8%."""
    generator = np.random.default_rng(n_seeds)
    missed = 0
    for _ in range(300):
        text, together = generator.normal(size=200), generator.normal(size=(3, 1))
        losses = [
            together + 0.3 * generator.normal(size=(3, 1)) + text + 0.3 * generator.normal(size=(3, 200)) for _ in range(6)
        ]
        # The methods that are compared may have fewer seeds than the others.
        runs = [dict(enumerate(rows[: n_seeds if m < 2 else 3])) for m, rows in enumerate(losses)]
        noise = seed_noise({m: {seed: float(row.mean()) for seed, row in rows.items()} for m, rows in enumerate(runs)})
        missed += difference(runs[0], runs[1], noise=noise, resamples=400).decided
    assert 0.015 <= missed / 300 <= 0.085


def test_noise_is_what_methods_and_seeds_leave() -> None:
    """Effects of either vanish; the degrees of freedom are those of two-way tables, also where a cell is missing."""
    additive = {m: {s: 10.0 * m + s for s in range(3)} for m in range(4)}
    clean = seed_noise(additive)
    assert clean is not None and clean.freedom == 6 and clean.std < 1e-12
    del additive[1][2]
    additive[0][0] += 1.0
    found = seed_noise(additive)
    assert found is not None and found.freedom == 5 and found.std > 0.1
    assert (
        seed_noise({0: {0: 1.0}, 1: {0: 2.0}}) is None and seed_noise({0: {0: 1.0, 1: 2.0}}) is None and seed_noise({}) is None
    )


def test_one_seed_decides_nothing_by_itself() -> None:
    """Its interval is of the text alone; with the noise of seeds it is whole."""
    world = np.full((1, 50), 0.5)
    assert not against_zero(world).decided
    ours, theirs = {0: world[0]}, {0: np.zeros(50)}
    wide, narrow = (difference(ours, theirs, noise=SeedNoise(std=std, freedom=9)) for std in (0.4, 0.05))
    assert not wide.decided and narrow.decided
    assert narrow.high - narrow.low == pytest.approx(2 * 2.262 * 0.05 * 2**0.5, rel=0.03)


def test_interval_narrows_with_windows_and_finds_a_difference() -> None:
    """Four times the text halves the interval, and what is three times its half-width away from zero is decided."""
    generator = np.random.default_rng(0)
    worlds = [(drawn(generator, 1, 200, 0, 0), drawn(generator, 1, 800, 0, 0)) for _ in range(50)]
    widths = [[f.high - f.low for f in map(against_zero, pair)] for pair in worlds]
    few, many = np.mean(widths, axis=0)
    assert many / few == pytest.approx(0.5, rel=0.15)
    assert all(against_zero(pair[1] + 1.5 * many, resamples=400).low > 0 for pair in worlds)


def test_difference_is_the_mean_over_shared_seeds_and_windows() -> None:
    """Seeds that one side lacks are left out; the sign is that of ours."""
    ours = {0: np.array([1.0, 2.0]), 1: np.array([3.0, 3.0]), 7: np.array([9.0, 9.0])}
    theirs = {0: np.array([2.0, 2.0]), 1: np.array([4.0, 5.0]), 8: np.array([9.0, 9.0])}
    found = difference(ours, theirs)
    assert (found.difference, found.n_seeds, found.n_windows) == (-1.0, 2, 2)
    assert found.low <= -1.0 <= found.high


def test_what_never_varies_has_an_interval_of_no_width() -> None:
    """A constant difference is decided; none at all is not."""
    constant, none = against_zero(np.full((2, 9), 0.25)), against_zero(np.zeros((2, 9)))
    assert (constant.low, constant.high, constant.decided) == (0.25, 0.25, True)
    assert (none.low, none.high, none.decided) == (0.0, 0.0, False)


def test_equal_arguments_give_equal_intervals() -> None:
    """The order of the seeds is no argument; the seed of the draws is."""
    world = drawn(np.random.default_rng(3), 3, 50, 1.0, 0.0)
    first = against_zero(world)
    zeros: dict[int, np.ndarray] = dict.fromkeys((2, 1, 0), np.zeros(50))
    assert difference({s: world[s] for s in (1, 0, 2)}, zeros) == first == against_zero(world)
    assert against_zero(world, seed=1).low != first.low


def test_many_windows_take_little_time() -> None:
    """Ten thousand resamples of three seeds and 20,000 windows: nothing loops over resamples."""
    world = np.random.default_rng(0).normal(size=(3, 20_000))
    start = time.process_time()
    against_zero(world)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        pytest.param({0: np.zeros(3)}, {1: np.zeros(3)}, r"must share a seed; got \[0\] and \[1\]", id="seeds"),
        pytest.param({}, {}, "must share a seed", id="nothing"),
        pytest.param({0: np.zeros(3)}, {0: np.zeros(4)}, r"`theirs\[0\]` must hold as many windows.*, 3; got 4", id="count"),
        pytest.param(
            {0: np.zeros(3), 1: np.zeros(2)}, {0: np.zeros(3), 1: np.zeros(2)}, r"`ours\[1\]` must hold", id="between seeds"
        ),
        pytest.param({0: np.zeros((2, 2))}, {0: np.zeros((2, 2))}, r"got shape \(2, 2\)", id="matrix"),
        pytest.param({0: np.zeros(1)}, {0: np.zeros(1)}, "at least 2 windows", id="one window"),
        pytest.param({0: np.array([0.0, np.nan])}, {0: np.zeros(2)}, r"`ours\[0\]` must be finite", id="diverged"),
    ],
)
def test_losses_that_cannot_be_paired_are_refused(
    ours: dict[int, np.ndarray], theirs: dict[int, np.ndarray], message: str
) -> None:
    """Naming the run."""
    with pytest.raises(UserError, match=message):
        difference(ours, theirs)


def test_too_few_resamples_are_refused() -> None:
    """The ends of a 95% interval need more than a few."""
    with pytest.raises(UserError, match="`resamples` must be at least 100; got 10"):
        against_zero(np.zeros((1, 2)), resamples=10)
