from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tokenmill.executor.garbage import NUM_NEW_OBJECTS, rare_collections


@pytest.fixture(autouse=True)
def _threshold() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_collections_are_rare_while_an_engine_steps() -> None:
    gc.set_threshold(700, 10, 10)
    with rare_collections():
        counts = [generation["collections"] for generation in gc.get_stats()]
        kept = [[index] for index in range(10_000)]  # by default a dozen collections
        assert [generation["collections"] for generation in gc.get_stats()] == counts
    assert len(kept) == 10_000
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("chosen", [(0, 10, 10), (2 * NUM_NEW_OBJECTS, 5, 5)])
def test_a_user_who_collects_less_often_is_left_alone(chosen: tuple[int, int, int]) -> None:
    gc.set_threshold(*chosen)
    with rare_collections():
        assert gc.get_threshold() == chosen


def test_the_threshold_comes_back_after_an_error() -> None:
    gc.set_threshold(701, 10, 10)
    with pytest.raises(RuntimeError), rare_collections():
        raise RuntimeError
    assert gc.get_threshold() == (701, 10, 10)
