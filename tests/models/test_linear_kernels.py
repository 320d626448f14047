"""The table of kernels says what the products themselves decide by."""

from __future__ import annotations

import pytest

from tokenmill.models.config import ModelConfig
from tokenmill.models.linear_kernels import KernelChoice, MeasuredProduct, linear_kernels
from tokenmill.ops.linear_plan import small_batch_plan
from tokenmill.ops.product_choices import ProductChoice, ProductKey

pytestmark = pytest.mark.spec("C6")

LLAMA_8B = ModelConfig.from_hf({
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "hidden_act": "silu",
})  # fmt: skip


def of_layer(choices: tuple[KernelChoice, ...], layer: str) -> list[KernelChoice]:
    return [choice for choice in choices if choice.layer == layer]


@pytest.mark.parametrize("float8", [False, True])
def test_one_row_few_rows_many_rows(float8: bool) -> None:
    choices = linear_kernels(LLAMA_8B, float8=float8)
    shapes = {choice.layer: (choice.out_features, choice.in_features, choice.count) for choice in choices}
    assert shapes == {
        "qkv_proj": (6144, 4096, 32),
        "o_proj": (4096, 4096, 32),
        "gate_up_proj": (28672, 4096, 32),
        "down_proj": (4096, 14336, 32),
        "lm_head": (128256, 4096, 1),
    }
    for layer in shapes:
        rows = of_layer(choices, layer)
        is_float8 = float8 and layer != "lm_head"
        assert {choice.weights for choice in rows} == {"float8" if is_float8 else "16 bits"}
        assert (rows[0].first_rows, rows[0].last_rows, rows[0].kernel) == (1, 1, "matvec")
        assert rows[-1].last_rows == 8192 and rows[-1].kernel == ("_scaled_mm" if is_float8 else "cuBLAS")
        for choice in rows[1:]:
            for num_rows in (choice.first_rows, choice.last_rows):
                plan = small_batch_plan(num_rows, choice.out_features, choice.in_features, 1 if is_float8 else 2)
                assert (plan.kernel == "library") == (choice.kernel in ("cuBLAS", "_scaled_mm"))


def test_deterministic_products_have_one_kernel() -> None:
    assert {choice.kernel for choice in linear_kernels(LLAMA_8B, float8=True, deterministic=True)} == {"invariant"}


def test_measured_algorithms_stand_with_the_products_they_compute() -> None:
    def measured(rows: int, out: int, size: int, dtype: str = "bfloat16", name: bytes | None = b"1") -> ProductChoice:
        return ProductChoice(ProductKey(rows, out, size, dtype), name, "tile", float(rows), 2.0 * rows)

    known = [
        measured(512, 6144, 4096),
        measured(8192, 6144, 4096, name=None),
        measured(176, 6144, 4096),
        measured(72, 28672, 4096),
        measured(512, 4096, 14336, dtype="float16"),
        measured(64, 6144, 4096),  # whose own kernel is used
        measured(512, 6144, 4000),
    ]
    choices = linear_kernels(LLAMA_8B, float8=False, measured=known)
    assert {choice.kernel for choice in choices if choice.measured} == {"cuBLAS"}
    assert {choice.layer: choice.measured for choice in choices if choice.measured} == {
        "qkv_proj": (
            MeasuredProduct(161, 176, "tile", 176.0, 352.0),
            MeasuredProduct(481, 512, "tile", 512.0, 1024.0),
            MeasuredProduct(4097, 8192, None, 8192.0, 16384.0),
        ),
        "gate_up_proj": (MeasuredProduct(65, 72, "tile", 72.0, 144.0),),
    }
    of_float16 = linear_kernels(LLAMA_8B, float8=False, dtype="float16", measured=known)
    assert [choice.layer for choice in of_float16 if choice.measured] == ["down_proj"]
    assert not any(choice.measured for choice in linear_kernels(LLAMA_8B, float8=True, measured=known))
    assert not any(c.measured for c in linear_kernels(LLAMA_8B, float8=False, deterministic=True, measured=known))
