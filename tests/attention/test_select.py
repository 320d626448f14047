from __future__ import annotations

import pytest
import torch

from tokenmill.attention.select import BACKENDS, select_backend
from tokenmill.errors import InvalidParameterError


@pytest.mark.parametrize("name", BACKENDS)
def test_by_name(name: str) -> None:
    assert select_backend(name, torch.device("cpu")).name == name


def test_auto_is_a_real_backend() -> None:
    assert select_backend("auto", torch.device("cpu")).name == "cpu"


def test_unknown_name() -> None:
    with pytest.raises(InvalidParameterError, match="refrence") as error:
        select_backend("refrence", torch.device("cpu"))
    assert error.value.field == "attn_backend"
    assert "Did you mean 'reference'?" in str(error.value)
