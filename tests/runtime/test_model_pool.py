"""Which models stay loaded, and in which order requests wait."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from da3_runtime.errors import CheckpointError
from da3_runtime.inference.model_pool import ModelKey, ModelPool
from da3_runtime.variants import Head

A, B, C = (ModelKey(name, Head.DPT) for name in "abc")


class Model(str):
    """A stand-in for a model: its name."""

    is_closed = False

    def close(self):
        self.is_closed = True


class Loader:
    """Records loads; a load blocks until ``may_go`` is set."""

    def __init__(self):
        self.loads = []
        self.models = []
        self.may_go = threading.Event()
        self.may_go.set()

    def __call__(self, key):
        self.loads.append(key)
        assert self.may_go.wait(10)
        self.models.append(Model(f"model {key.model_id}"))
        return self.models[-1]


def use(pool, key):
    with pool.borrow(key) as model:
        return model


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_model_is_loaded_once():
    loader = Loader()
    pool = ModelPool(loader, 1)
    assert [use(pool, A), use(pool, A)] == ["model a", "model a"]
    assert loader.loads == [A]


def test_the_least_recently_used_model_is_closed_first():
    loader = Loader()
    pool = ModelPool(loader, 2)
    for key in (A, B, A, C):
        use(pool, key)
    assert pool.loaded() == [A, C]
    use(pool, A)
    assert loader.loads == [A, B, C]


def test_requests_for_a_loading_model_wait_for_its_one_load():
    loader = Loader()
    loader.may_go.clear()
    pool = ModelPool(loader, 1)
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(use, pool, A) for _ in range(8)]
        wait_until(lambda: loader.loads)
        assert pool.loaded() == []
        loader.may_go.set()
        assert {each.result(10) for each in asked} == {"model a"}
    assert loader.loads == [A]


def test_a_model_in_use_is_not_closed_and_the_next_one_waits():
    loader = Loader()
    pool = ModelPool(loader, 1)
    with ThreadPoolExecutor(1) as threads:
        with pool.borrow(A):
            waiting = threads.submit(use, pool, B)
            time.sleep(0.05)
            assert loader.loads == [A]
        assert waiting.result(10) == "model b"
    assert pool.loaded() == [B]


def test_a_request_that_waits_for_room_is_not_overtaken():
    loader = Loader()
    pool = ModelPool(loader, 1)
    begun = threading.Event()

    def use_again():
        begun.set()
        return use(pool, A)

    with ThreadPoolExecutor(2) as threads:
        with pool.borrow(A):
            waiting = threads.submit(use, pool, B)
            wait_until(lambda: pool._changed._waiters)  # B waits for room
            later = threads.submit(use_again)
            assert begun.wait(10)
            wait([later], timeout=0.5)
            assert not later.done(), "A is loaded, but B was first"
        assert waiting.result(10) == "model b"
        assert later.result(10) == "model a"
    assert loader.loads == [A, B, A]


def test_a_failed_load_fails_all_waiting_requests_and_is_retried_later():
    fails = threading.Event()
    fails.set()

    def load(key):
        if fails.is_set():
            raise CheckpointError("no weights")
        return Model(key.model_id)

    pool = ModelPool(load, 1)
    with ThreadPoolExecutor(4) as threads:
        for each in [threads.submit(use, pool, A) for _ in range(4)]:
            with pytest.raises(CheckpointError):
                each.result(10)
    assert pool.loaded() == []
    fails.clear()
    assert use(pool, A) == "a"
    assert use(pool, B) == "b"


def test_a_model_is_closed_before_the_next_one_is_loaded():
    open_while_loading = []

    class Watching(Loader):
        def __call__(self, key):
            open_while_loading.append([model for model in self.models if not model.is_closed])
            return super().__call__(key)

    pool = ModelPool(Watching(), 2)
    for key in (A, B, C):
        use(pool, key)
    assert open_while_loading == [[], ["model a"], ["model b"]]


def test_drop_idle_closes_all_models_but_those_in_use():
    loader = Loader()
    pool = ModelPool(loader, 3)
    use(pool, A)
    use(pool, B)
    with pool.borrow(C):
        assert pool.drop_idle()
        assert pool.loaded() == [C]
        assert [model.is_closed for model in loader.models] == [True, True, False]
        assert not pool.drop_idle()
    assert use(pool, A) == "model a"
    assert loader.loads == [A, B, C, A]
