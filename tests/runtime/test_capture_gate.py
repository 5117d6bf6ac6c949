"""Many use the GPU, or one captures."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from da3_runtime.backends.gpu.capture_gate import CaptureGate


def test_the_only_user_may_capture_and_so_may_one_who_is_no_user():
    gate = CaptureGate()
    with gate.use(), gate.capture() as may_capture:
        assert may_capture
    with gate.capture() as may_capture:
        assert may_capture


def test_one_of_two_users_may_not():
    gate = CaptureGate()
    with gate.use(), gate.use(), gate.capture() as may_capture:
        assert not may_capture
    with gate.use(), gate.capture() as may_capture:
        assert may_capture


def test_who_would_use_the_gpu_waits_for_a_capture_to_end():
    gate, entered = CaptureGate(), threading.Event()

    def use():
        with gate.use():
            entered.set()

    with ThreadPoolExecutor(1) as threads:
        with gate.use(), gate.capture():
            waiting = threads.submit(use)
            assert not entered.wait(0.05)
            with gate.capture() as second:
                assert not second
            assert not entered.is_set(), "who may not capture ends nobody's capture"
        waiting.result(10)


def test_a_capture_that_fails_lets_the_others_in():
    gate = CaptureGate()
    with pytest.raises(ZeroDivisionError), gate.use(), gate.capture():
        raise ZeroDivisionError
    with gate.use(), gate.capture() as may_capture:
        assert may_capture
