from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tokenmill.attention.select import select_backend
from tokenmill.errors import InvalidParameterError


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_by_name(name: str) -> None:
    assert select_backend(name, torch.device("cpu")).name == name


def test_auto_is_a_real_backend() -> None:
    assert select_backend("auto", torch.device("cpu")).name == "cpu"


def test_unknown_name() -> None:
    with pytest.raises(InvalidParameterError, match="refrence") as error:
        select_backend("refrence", torch.device("cpu"))
    assert error.value.field == "attn_backend"
    assert "Did you mean 'reference'?" in str(error.value)


@pytest.mark.gpu
def test_auto_on_a_gpu() -> None:
    assert select_backend("auto", torch.device("cuda")).name == "triton"


def test_triton_needs_a_gpu() -> None:
    with pytest.raises(InvalidParameterError, match="does not run on the device 'cpu'") as error:
        select_backend("triton", torch.device("cpu"))
    assert error.value.field == "attn_backend"


def test_a_model_on_a_cpu_never_loads_triton() -> None:
    code = "import sys, torch\nfrom tokenmill.attention.select import select_backend\n"
    code += "select_backend('auto', torch.device('cpu'))\nassert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
