"""Work in strips of rows on several cores."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest

from runtime import strips as module
from runtime.strips import on_cores, strips


@pytest.fixture(params=[1, 2, 4])
def threads(request, monkeypatch):
    monkeypatch.setattr(module, "_thread_count", lambda: request.param)
    module._threads.cache_clear()
    yield request.param
    module._threads().shutdown()
    module._threads.cache_clear()


@pytest.mark.parametrize(("height", "rows"), [(1, 1), (10, 3), (10, 10), (10, 99), (9, 3)])
def test_strips_make_the_whole(height, rows):
    parts = list(strips(height, rows))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(height))
    assert all(part.stop - part.start == rows for part in parts[:-1])


def test_every_part_is_worked_on_once(threads):
    seen = []
    on_cores(lambda part: seen.append(part.start), strips(1000, 3))
    assert sorted(seen) == list(range(0, 1000, 3))


def test_several_threads_work_at_once(threads):
    together = threading.Barrier(threads, timeout=20)
    on_cores(lambda part: together.wait(), strips(threads, 1))


def test_what_is_raised_in_any_thread_is_raised(threads):
    for wrong in (0, 57, 99):

        def work(part, wrong=wrong):
            if part.start == wrong:
                raise ValueError("row")

        with pytest.raises(ValueError, match="row"):
            on_cores(work, strips(100, 1))


def test_once_it_has_raised_no_thread_is_in_it(threads):
    caller, late = threading.get_ident(), []

    def work(part):
        if threading.get_ident() == caller:
            raise ValueError("caller's")
        time.sleep(0.02)
        late.append(part)

    with pytest.raises(ValueError, match="caller's"):
        on_cores(work, strips(200, 1))
    done = len(late)
    assert done < threads
    time.sleep(0.1)
    assert len(late) == done


def test_without_threads_the_caller_does_it_all(monkeypatch):
    def refuse():
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(module, "_thread_count", lambda: 4)
    monkeypatch.setattr(module, "_threads", refuse)
    done = []
    on_cores(done.append, strips(20, 1))
    assert len(done) == 20


def test_work_within_work(threads):
    done = []
    on_cores(lambda _: on_cores(done.append, strips(10, 1)), strips(10, 1))
    assert len(done) == 100


def test_the_caller_does_it_all_where_the_others_are_busy(threads):
    busy, done = threading.Event(), []
    waiting = [module._threads().submit(busy.wait, 30) for _ in range(threads)]
    try:
        on_cores(done.append, strips(20, 1))
        assert len(done) == 20
        assert not any(each.done() for each in waiting)
        # What waits for a thread holds nothing of what it was for.
        held = np.zeros(10)
        known = weakref.ref(held)
        on_cores(lambda part, held=held: held[part].sum(), strips(10, 1))
        del held
        gc.collect()
        assert known() is None
    finally:
        busy.set()


def test_requests_at_once_share_the_threads(threads):
    totals = [[] for _ in range(8)]
    callers = [
        threading.Thread(target=on_cores, args=(total.append, strips(500, 1))) for total in totals
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert [len(total) for total in totals] == [500] * 8
