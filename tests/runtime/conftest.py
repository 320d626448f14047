"""All tests of this folder compute with one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.single_thread import single_thread


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield
