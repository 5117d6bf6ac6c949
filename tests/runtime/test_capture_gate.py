"""Many threads use the GPU, or one captures a CUDA graph."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from da3_runtime.backends.gpu.capture_gate import CaptureGate


def test_the_only_user_and_a_caller_without_use_may_capture():
    gate = CaptureGate()
    with gate.use(), gate.capture() as may_capture:
        assert may_capture
    with gate.capture() as may_capture:
        assert may_capture


def test_one_of_two_users_may_not_capture():
    gate = CaptureGate()
    with gate.use(), gate.use(), gate.capture() as may_capture:
        assert not may_capture
    with gate.use(), gate.capture() as may_capture:
        assert may_capture


def test_use_waits_for_a_capture_to_end():
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
            assert not entered.is_set(), "a refused capture must not end the running one"
        waiting.result(10)


def test_a_failed_capture_admits_other_users():
    gate = CaptureGate()
    with pytest.raises(ZeroDivisionError), gate.use(), gate.capture():
        raise ZeroDivisionError
    with gate.use(), gate.capture() as may_capture:
        assert may_capture
