from __future__ import annotations

import pytest

from tokenmill.errors import InvalidParameterError
from tokenmill.quantization.fp8 import Fp8Linear
from tokenmill.quantization.select import linear_method_for
from tokenmill.quantization.unquantized import UnquantizedLinear


@pytest.mark.parametrize("name", ["none", None])
def test_no_quantization(name: None) -> None:
    assert isinstance(linear_method_for(name)("model.layers.0.mlp.down_proj"), UnquantizedLinear)


def test_fp8_leaves_the_head_alone() -> None:
    factory = linear_method_for("fp8")
    first, second = factory("model.layers.0.mlp.down_proj"), factory("model.layers.0.mlp.down_proj")
    assert isinstance(first, Fp8Linear)
    assert first is not second
    assert isinstance(factory("lm_head"), UnquantizedLinear)
    assert isinstance(linear_method_for("fp8", quantize_lm_head=True)("lm_head"), Fp8Linear)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="fp9") as error:
        linear_method_for("fp9")  # type: ignore[arg-type]
    assert error.value.field == "quantization"
    assert "fp8" in str(error.value)
