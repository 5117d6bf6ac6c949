"""Fixtures: a service whose network is a stand-in."""

from functools import partial

import pytest

from tests.support.stand_in import StandIn, service_of


@pytest.fixture
def network():
    """The network of the fixture ``serve``."""
    return StandIn()


@pytest.fixture
def serve(monkeypatch, network, tmp_path):
    """Makes a service, from settings by keyword."""
    return partial(service_of, monkeypatch, lambda graph: network, tmp_path)
