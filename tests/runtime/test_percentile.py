"""Exact percentiles of maps: NumPy's, where values repeat, stand in order, or keep step with the sample."""

import numpy as np
import pytest

from da3_runtime.output.percentile import percentile_neighbours

RNG = np.random.default_rng(0)
SIZE = 512, 1024
MAPS = {
    "even": RNG.uniform(0.5, 2, SIZE),
    "long tails": RNG.standard_cauchy(SIZE),
    "in order": np.arange(np.prod(SIZE)).reshape(SIZE),
    "constant": np.full(SIZE, 3.0),
    "two values": RNG.integers(0, 2, SIZE),
    "one outlier": np.where(np.arange(np.prod(SIZE)) == 77, 1e30, 1.0).reshape(SIZE),
    "columns": np.broadcast_to(RNG.uniform(0.5, 2, SIZE[1]), SIZE),
    "one": np.ones((1, 1)),
    "two": np.array([[2.0, 1.0]]),
    "few": RNG.uniform(0, 1, (3, 7)),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("percent", [0, 0.01, 0.5, 10, 50, 60, 99.5, 100])
def test_it_is_numpys(name, percent):
    values = MAPS[name].astype(np.float32)
    before = values.copy()
    ((below, above, share),) = percentile_neighbours(values, [percent])
    assert share == 1 or below == np.percentile(values, percent, method="lower")
    assert share == 0 or above == np.percentile(values, percent, method="higher")
    assert below + (above - below) * share == pytest.approx(
        np.percentile(values.astype(np.float64), percent), rel=1e-6
    )
    assert np.array_equal(values, before)


@pytest.fixture
def looked_at(monkeypatch):
    """How many values each call looked at closely."""
    seen = []
    partition = np.partition

    def noted(values, *args):
        seen.append(values.size)
        return partition(values, *args)

    monkeypatch.setattr(np, "partition", noted)
    return seen


@pytest.mark.parametrize("name", ["even", "long tails", "in order", "columns"])
@pytest.mark.parametrize("percent", [0.5, 50, 99.5])
def test_little_is_looked_at_closely(looked_at, name, percent):
    percentile_neighbours(MAPS[name].astype(np.float32), [percent])
    assert max(looked_at) < np.prod(SIZE) / 10


def test_a_sample_that_misleads_is_noticed(looked_at):
    values = MAPS["even"].astype(np.float32)
    drawn = np.random.default_rng(0).integers(0, values.size, 2**12)
    values.ravel()[drawn] = 0
    (median,) = percentile_neighbours(values, [50])
    assert median.below == np.percentile(values, 50, method="lower")
    assert looked_at == [values.size]


@pytest.mark.parametrize("name", MAPS)
def test_several_at_once_are_as_each_alone(name):
    values = MAPS[name].astype(np.float32)
    percents = [99.5, 0.5, 0.6, 40]
    alone = [percentile_neighbours(values, [percent])[0] for percent in percents]
    assert percentile_neighbours(values, percents) == alone
