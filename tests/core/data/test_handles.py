"""HandleCache: bounded, reopened after a discard, never shared by a fork or a pickle."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from fmsuite.core.data.handles import HandleCache

events: list[str] = []


class Handle:
    def __init__(self, path: str) -> None:
        self.path = path
        self.pid = os.getpid()


def opener(path: str) -> Handle:
    if "bad" in path:
        raise OSError(path)
    events.append(f"open {path}")
    return Handle(path)


def closer(handle: Handle) -> None:
    events.append(f"close {handle.path}")


@pytest.fixture(autouse=True)
def _clean() -> None:
    events.clear()


def test_an_open_file_is_reused_and_the_least_recently_used_one_is_closed() -> None:
    cache = HandleCache(opener, closer, limit=2)
    first = cache.get("a")
    cache.get("b")
    assert cache.get("a") is first
    cache.get("c")
    assert events == ["open a", "open b", "close b", "open c"]
    assert cache.get("a") is first


def test_a_discarded_file_is_closed_and_opened_again() -> None:
    cache = HandleCache(opener, closer)
    first = cache.get("a")
    cache.discard("a")
    cache.discard("never opened")
    assert cache.get("a") is not first
    assert events == ["open a", "close a", "open a"]


def test_a_file_that_does_not_open_is_not_remembered() -> None:
    cache = HandleCache(opener, closer)
    for _ in range(2):
        with pytest.raises(OSError, match="bad"):
            cache.get("bad")
    assert len(cache._open) == 0


def test_close_closes_everything_and_goes_on_past_one_that_fails() -> None:
    cache = HandleCache(opener, closer)
    cache.get("a")
    cache.get("b")
    cache.close()
    cache.close()
    assert sorted(events) == ["close a", "close b", "open a", "open b"]
    closed: list[str] = []

    def stubborn(handle: Handle) -> None:
        closed.append(handle.path)
        if handle.path == "b":
            raise OSError("b does not close")

    cache = HandleCache(opener, stubborn)
    for path in "abc":
        cache.get(path)
    with pytest.raises(OSError, match="b does not close"):
        cache.close()
    assert sorted(closed) == ["a", "b", "c"]
    assert len(cache._open) == 0


def test_a_cache_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 open files"):
        HandleCache(opener, closer, limit=0)


def test_handles_do_not_travel_in_a_pickle() -> None:
    cache = HandleCache(opener, closer)
    cache.get("a")
    copy = pickle.loads(pickle.dumps(cache))
    copy.close()
    assert events == ["open a"]
    copy.get("a")
    assert events == ["open a", "open a"]
    assert cache.get("a").path == "a"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_opens_its_own_and_leaves_the_parents_alone(tmp_path: Path) -> None:
    cache = HandleCache(opener, closer)
    parent = cache.get("a")
    cache.get("b")
    child = os.fork()
    if child == 0:
        report = "failed"
        try:
            events.clear()
            cache.discard("b")
            mine = cache.get("a")
            report = f"{mine is not parent} {mine.pid == os.getpid()} {events}"
        finally:
            (tmp_path / "report").write_text(report)
            os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "report").read_text() == "True True ['open a']"
    assert cache.get("a") is parent
