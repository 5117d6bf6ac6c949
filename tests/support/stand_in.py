"""A service whose only network is a stand-in, and a client of its web application in this process."""

import asyncio
import contextlib
import threading

import httpx
import numpy as np

import da3_runtime.serve.service
from da3_runtime.backends.base import Backend
from da3_runtime.inference.estimator import Estimator
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.network_io import RawOutputs
from da3_runtime.serve.http_server import make_app
from da3_runtime.serve.service import Service
from da3_runtime.settings import Settings
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.variants import find_head, find_variant
from tests.support.paths import NANO


class Pretended(Backend):
    """A network that any machine can run, and that tests make themselves."""

    @classmethod
    def unavailable(cls):
        return None

    @classmethod
    def load(cls, folder, graph, settings):
        raise NotImplementedError


class StandIn(Pretended):
    """A network that runs when ``may_run`` is set, and closes when ``may_close`` is."""

    name, precision, trained, gains_from_batches = "stand-in", "fp32", True, True

    def __init__(self):
        self.batches = []
        self.may_run, self.may_close = threading.Event(), threading.Event()
        self.is_closing = threading.Event()
        self.may_run.set()
        self.may_close.set()

    def run(self, images, conditions=None):
        self.batches.append(len(images))
        assert self.may_run.wait(20)
        depth = np.ones(images.shape[:4], np.float32)
        cameras = (
            np.tile(np.eye(3, size, dtype=np.float32), (*images.shape[:2], 1, 1)) for size in (3, 4)
        )
        return RawOutputs(depth, depth, None, *cameras)

    def close(self):
        self.is_closing.set()
        assert self.may_close.wait(20)


def service_of(monkeypatch, network_of, folder, **given):
    """A service that runs ``network_of(graph)`` for every graph of every model."""

    def load(engine, images, inference):
        variant, head = find_variant(engine.model_id), find_head(engine.head)
        graphs = {graph.name: network_of(graph) for graph in variant.graphs}
        loaded = Loaded(EngineFolder(variant, head, folder, None), graphs, [])
        return Estimator(loaded, images, inference)

    monkeypatch.setattr(da3_runtime.serve.service.Estimator, "load", load)
    return Service(Settings.of(**{"model_id": NANO} | given))


@contextlib.asynccontextmanager
async def client_of(service):
    transport = httpx.ASGITransport(make_app(service, threading.Thread()))
    async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=20) as client:
        yield client


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)
