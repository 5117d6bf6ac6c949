"""Fixtures of the exporter's tests."""

import pytest

from tests.support import builds


@pytest.fixture
def one_case(monkeypatch):
    """Measure parity on one small case only."""
    builds.measure_on(monkeypatch, builds.ONE_CASE)
