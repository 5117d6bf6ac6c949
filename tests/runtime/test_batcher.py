"""Waiting images run as batches, with the results that they would get alone."""

import threading
import time

import numpy as np
import pytest

from da3_runtime.errors import DeviceLostError, InferenceError, OutOfMemoryError
from da3_runtime.inference.batcher import Batcher
from da3_runtime.network_io import RawOutputs


class Network:
    """A network whose depth is the image's first channel; ``blocked``: batches wait for ``gate``."""

    def __init__(self, blocked=False):
        self.batches = []
        self.gate = threading.Event()
        self.fails = lambda images: None
        if not blocked:
            self.gate.set()

    def __call__(self, images, conditions):
        self.batches.append(images.shape)
        self.gate.wait(20)
        if error := self.fails(images):
            raise error
        return {"model": RawOutputs(images[..., 0].astype(np.float32))}


def image(value, height=14, width=28):
    return np.full((1, 1, height, width, 3), value, np.uint8)


def eight(views, height, width):
    return 8


class Requests:
    """Requests, each on its own thread."""

    def __init__(self, batcher):
        self.batcher = batcher
        self.threads = []
        self.results = {}

    def send(self, value, ready=None, **size):
        def work():
            try:
                with self.batcher.expect() as pending:
                    if ready is not None:
                        assert ready.wait(20)
                    share = pending.run(image(value, **size))
                self.results[value] = share.raw["model"].depth[share.position]
            except Exception as error:
                self.results[value] = error

        thread = threading.Thread(target=work)
        thread.start()
        self.threads.append(thread)

    def wait(self):
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()

    def check(self, *values):
        for value in values:
            assert (self.results[value] == value).all()


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def behind_one(batcher, network, values, width=lambda value: 28):
    """Finished requests: ``values`` waited while the first one, of value 1, ran."""
    requests = Requests(batcher)
    requests.send(1)
    until(lambda: network.batches)
    for value in values:
        requests.send(value, width=width(value))
    until(lambda: len(batcher._waiting) == len(values))
    network.gate.set()
    requests.wait()
    return requests


def test_requests_that_wait_form_the_next_batch():
    network = Network(blocked=True)
    batcher = Batcher(network, eight, max_wait=0)
    requests = behind_one(batcher, network, range(2, 7))
    assert [shape[0] for shape in network.batches] == [1, 5]
    requests.check(*range(1, 7))


def test_a_batch_has_images_of_one_size_and_no_more_than_fit():
    network = Network(blocked=True)
    batcher = Batcher(network, lambda views, height, width: 3 if width == 28 else 2, max_wait=0)
    requests = behind_one(batcher, network, range(2, 12), lambda value: 28 if value % 2 else 42)
    requests.check(*range(1, 12))
    assert sum(shape[0] for shape in network.batches) == 11
    for count, _, _, width, _ in network.batches:
        assert count <= (3 if width == 28 else 2)
    assert sum(shape[3] == 28 for shape in network.batches[1:]) == 2
    assert sum(shape[3] == 42 for shape in network.batches[1:]) == 3


def test_a_finished_request_does_not_wait_for_the_next_batch():
    network, held = Network(blocked=True), threading.Event()
    network.fails = lambda images: None if (images != 4).all() or held.wait(20) else ValueError
    batcher = Batcher(network, lambda views, height, width: 2, max_wait=0)
    requests = Requests(batcher)
    requests.send(1)
    until(lambda: network.batches)
    for value in (2, 3, 4):
        requests.send(value)
        until(lambda count=value - 1: len(batcher._waiting) == count)
    network.gate.set()
    until(lambda: {1, 2, 3} <= set(requests.results) or len(network.batches) > 4)
    assert 4 not in requests.results
    held.set()
    requests.wait()
    requests.check(1, 2, 3, 4)


def test_no_batch_runs_in_an_exclusive_section():
    network = Network()
    batcher = Batcher(network, eight, max_wait=0)
    requests = Requests(batcher)
    with batcher.exclusive():
        requests.send(1)
        until(lambda: batcher._waiting)
        time.sleep(0.05)
        assert not network.batches
    requests.wait()
    requests.check(1)


def test_a_lone_request_does_not_wait_for_others():
    batcher = Batcher(Network(), eight, max_wait=3600)
    with batcher.expect() as pending:
        assert pending.run(image(7)).position == 0  # max_wait is not used up


def test_a_batch_with_room_waits_for_requests_being_decoded():
    network = Network()
    batcher = Batcher(network, eight, max_wait=20)
    requests, decoded = Requests(batcher), threading.Event()
    for value in range(1, 4):
        requests.send(value, ready=decoded)
    until(lambda: len(batcher._expected) == 3)
    requests.send(4)
    until(lambda: len(batcher._waiting) == 1)
    decoded.set()
    requests.wait()
    assert [shape[0] for shape in network.batches] == [4]
    requests.check(1, 2, 3, 4)


@pytest.mark.parametrize("max_wait", [0, 0.05])
def test_a_batch_waits_no_longer_than_max_wait(max_wait):
    network = Network()
    batcher = Batcher(network, eight, max_wait)
    requests, decoded = Requests(batcher), threading.Event()
    requests.send(1, ready=decoded)
    until(lambda: batcher._expected)
    requests.send(2)
    until(lambda: 2 in requests.results)
    decoded.set()
    requests.wait()
    requests.check(1, 2)
    assert [shape[0] for shape in network.batches] == [1, 1]


def test_a_batch_does_not_wait_for_a_request_whose_decoding_failed():
    batcher = Batcher(Network(), eight, max_wait=3600)
    requests = Requests(batcher)
    with batcher.expect():
        requests.send(1)
        until(lambda: batcher._waiting)
        assert not requests.results
    requests.wait()
    requests.check(1)


def test_only_the_faulty_image_of_a_batch_fails():
    network = Network(blocked=True)
    network.fails = lambda images: InferenceError("no") if (images == 3).any() else None
    batcher = Batcher(network, eight, max_wait=0)
    requests = behind_one(batcher, network, range(2, 5))
    requests.check(1, 2, 4)
    assert isinstance(requests.results[3], InferenceError)
    assert [shape[0] for shape in network.batches] == [1, 3, 1, 1, 1]


@pytest.mark.parametrize("error", [OutOfMemoryError("no"), DeviceLostError(), ValueError("unexpected")])
def test_other_errors_fail_the_whole_batch_without_a_retry(error):
    network = Network(blocked=True)
    network.fails = lambda images: error if len(images) > 1 else None
    batcher = Batcher(network, eight, max_wait=0)
    requests = behind_one(batcher, network, range(2, 5))
    requests.check(1)
    assert [requests.results[value] for value in range(2, 5)] == [error] * 3
    assert [shape[0] for shape in network.batches] == [1, 3]
    requests.send(5)
    requests.wait()
    requests.check(5)


def test_many_requests_from_many_threads_get_their_own_results():
    network = Network()
    batcher = Batcher(network, eight, max_wait=0.001)
    requests = Requests(batcher)
    for value in range(200):
        requests.send(value, width=14 * (1 + value % 3))
    requests.wait()
    requests.check(*range(200))
    assert sum(shape[0] for shape in network.batches) == 200
    assert not batcher._waiting
    assert not batcher._expected
