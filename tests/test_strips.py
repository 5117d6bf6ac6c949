"""Work in strips of rows on several cores."""

import threading

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


def test_the_caller_does_it_all_where_the_others_are_busy(threads):
    busy, done = threading.Event(), []
    waiting = [module._threads().submit(busy.wait, 30) for _ in range(threads)]
    try:
        on_cores(done.append, strips(20, 1))
        assert len(done) == 20
        assert not any(each.done() for each in waiting)
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
