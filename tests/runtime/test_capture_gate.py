"""The gate admits many users of the GPU, or one capture."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from da3_runtime.backends.gpu.capture_gate import CaptureGate


def test_a_sole_user_may_capture_and_so_may_a_caller_outside_use():
    gate = CaptureGate()
    with gate.use(), gate.capture() as may_capture:
        assert may_capture
    with gate.capture() as may_capture:
        assert may_capture


def test_a_user_may_not_capture_beside_another_user():
    gate = CaptureGate()
    with gate.use(), gate.use(), gate.capture() as may_capture:
        assert not may_capture
    with gate.use(), gate.capture() as may_capture:
        assert may_capture


def test_a_user_waits_for_a_capture_to_end():
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
            assert not entered.is_set(), "a refused capture does not end the running one"
        waiting.result(10)


def test_a_failed_capture_opens_the_gate():
    gate = CaptureGate()
    with pytest.raises(ZeroDivisionError), gate.use(), gate.capture():
        raise ZeroDivisionError
    with gate.use(), gate.capture() as may_capture:
        assert may_capture
