"""Exact percentiles of maps: NumPy's, where values repeat, stand in order, or keep step with the sample."""

import numpy as np
import pytest

from runtime.percentile import percentile_neighbours

RNG = np.random.default_rng(0)
SIZE = 700, 900
MAPS = {
    "even": RNG.uniform(0.5, 2, SIZE),
    "long tails": RNG.standard_cauchy(SIZE),
    "in order": np.arange(np.prod(SIZE)).reshape(SIZE),
    "constant": np.full(SIZE, 3.0),
    "two values": RNG.integers(0, 2, SIZE),
    "one outlier": np.where(np.arange(np.prod(SIZE)) == 77, 1e30, 1.0).reshape(SIZE),
    # Every value that the sample takes is less than any other.
    "in step with the sample": (np.arange(np.prod(SIZE)) % (np.prod(SIZE) // 2**13) > 0).reshape(SIZE)
    * RNG.uniform(1, 2, SIZE),
    "one": np.ones((1, 1)),
    "two": np.array([[2.0, 1.0]]),
    "few": RNG.uniform(0, 1, (3, 7)),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("percent", [0, 0.01, 0.5, 10, 50, 60, 99.5, 100])
def test_it_is_numpys(name, percent):
    values = MAPS[name].astype(np.float32)
    before = values.copy()
    below, above, share = percentile_neighbours(values, percent)
    assert share == 1 or below == np.percentile(values, percent, method="lower")
    assert share == 0 or above == np.percentile(values, percent, method="higher")
    assert below + (above - below) * share == pytest.approx(
        np.percentile(values.astype(np.float64), percent), rel=1e-6
    )
    assert np.array_equal(values, before)


def test_little_is_looked_at_closely(monkeypatch):
    seen = []
    partition = np.partition

    def noted(values, *args):
        seen.append(values.size)
        return partition(values, *args)

    monkeypatch.setattr(np, "partition", noted)
    for percent in (0.5, 50, 99.5):
        percentile_neighbours(MAPS["even"].astype(np.float32), percent)
    assert max(seen) < np.prod(SIZE) / 10
    percentile_neighbours(MAPS["in step with the sample"].astype(np.float32), 50)
    assert seen[-1] == np.prod(SIZE)
