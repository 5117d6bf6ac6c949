"""Work in parts on several cores."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import numpy as np
import pytest

from da3_runtime.util import parallel as module
from da3_runtime.util.parallel import ahead, on_cores, strips


@pytest.fixture(params=[1, 2, 4])
def threads(request, monkeypatch):
    monkeypatch.setattr(module, "_thread_count", lambda: request.param)
    module._threads.cache_clear()
    module._idle.cache_clear()
    yield request.param
    module._threads().shutdown()
    module._threads.cache_clear()
    module._idle.cache_clear()


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


def test_items_are_in_order(threads):
    assert list(ahead(iter(range(1000)))) == list(range(1000))
    assert list(ahead([])) == []


def test_the_next_item_is_made_meanwhile(threads):
    begun = [threading.Event() for _ in range(5)]

    def items():
        for number, event in enumerate(begun):
            event.set()
            yield number

    for number in ahead(items()):
        following = begun[number + 1] if number < 4 else begun[number]
        assert following.wait(20 if threads > 1 else 0) is (threads > 1 or number == 4)


def test_few_items_are_made_ahead(threads):
    made = []

    def items():
        for number in range(50):
            made.append(number)
            yield number

    for number in ahead(items()):
        time.sleep(0.001)
        # One is in the caller's hands, and one is being made.
        assert len(made) <= number + 1 + (module._AHEAD + 1 if threads > 1 else 0)


def test_what_is_raised_where_items_are_made_is_raised(threads):
    def items():
        yield 1
        raise ValueError("second")

    seen = []
    with pytest.raises(ValueError, match="second"):
        seen.extend(ahead(items()))
    assert list(ahead([1, 2])) == [1, 2]


def test_nothing_is_made_once_the_caller_stops(threads):
    made = []

    def items():
        for number in range(100):
            time.sleep(0.005)
            made.append(number)
            yield number

    for _ in range(3):
        read = ahead(items())
        assert next(read) == 0
        read.close()
        count = len(made)
        time.sleep(0.05)
        assert len(made) == count < 10
        made.clear()


def test_the_caller_makes_items_where_the_others_are_busy(threads):
    with ExitStack() as open_ones:
        for _ in range(threads - 1):
            busy = open_ones.enter_context(closing(ahead(range(1000))))
            assert next(busy) == 0
        names = list(ahead(threading.current_thread().name for _ in range(5)))
    assert names == [threading.current_thread().name] * 5
    names = list(ahead(threading.current_thread().name for _ in range(5)))
    assert (names[0] == threading.current_thread().name) is (threads == 1)


def test_a_thread_that_cannot_be_started_is_not_counted_for_ever(threads, monkeypatch):
    def refuse():
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_threads", refuse)
        for _ in range(5):
            if threads > 1:
                with pytest.raises(RuntimeError):
                    next(ahead([0]))
    names = list(ahead(threading.current_thread().name for _ in range(5)))
    assert (names[0] == threading.current_thread().name) is (threads == 1)


def test_pictures_read_ahead_while_others_are_tone_mapped(threads):
    """Who makes items ahead takes a thread that others wait for no longer than they work themselves."""
    done = []

    def read(_):
        done.extend(ahead(range(50)))
        on_cores(lambda part: done.append(part.start), strips(50, 1))

    with ThreadPoolExecutor(8) as callers:
        for call in [callers.submit(read, number) for number in range(40)]:
            call.result(30)
    assert sorted(done) == sorted(list(range(50)) * 80)
