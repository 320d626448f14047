"""The Triton kernels that work on rows or heads against the definitions in `ops`: interpreted, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.support.triton_kernels import TOLERANCES, relative_error
from tokenmill.ops.activation import gelu_tanh_and_mul_reference, silu_and_mul_reference
from tokenmill.ops.fp8 import per_token_quantize_reference
from tokenmill.ops.rms_norm import add_rms_norm_reference, rms_norm_reference
from tokenmill.ops.rope import apply_rope_reference, rotation_torch

pytest.importorskip("triton")
from tokenmill.ops.triton import activation, fp8, kv_cache, rms_norm, rope

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(0, 16), (1, 5), (2, 64), (17, 33)]
REAL = pytest.param((300, 4096), marks=pytest.mark.gpu)


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3).to(device, dtype)


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert relative_error(actual, expected) <= TOLERANCES[actual.dtype]


def check_last_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """One norm by two compilations of the kernel, which may add up a row's squares in different orders.

    The sums differ in their last bits then, and a few results lie on the other side of where bfloat16 rounds: these,
    at most one in a hundred, are one step of bfloat16 apart.
    """
    assert actual.dtype == expected.dtype == torch.bfloat16
    if not actual.is_cuda:
        assert torch.equal(actual, expected)
        return
    steps = (actual.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert int(steps.max()) <= 1
    assert int((steps != 0).sum()) <= max(1, 0.01 * steps.numel())


def check_quantized(actual: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor) -> None:
    """Scales and values are exact; but the interpreter rounds ties up, cuts denormal numbers off, and loses a carry
    from the mantissa into the exponent: a few of its values are up to eight steps of float8 too low or one too high.
    """
    values, scales = actual
    expected = per_token_quantize_reference(rows)
    torch.testing.assert_close(scales, expected.scales, rtol=0.0, atol=0.0)
    assert values.dtype == torch.float8_e4m3fn
    if values.is_cuda:
        assert torch.equal(values.view(torch.uint8), expected.values.view(torch.uint8))
    else:
        steps = values.view(torch.uint8).int() - expected.values.view(torch.uint8).int()
        assert not values.numel() or -8 <= int(steps.min()) <= int(steps.max()) <= 1
        assert int((steps != 0).sum()) <= 0.1 * steps.numel() + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, REAL])
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x, weight = normal(shape, dtype, device), normal(shape[1:], dtype, device, 1)
    check(rms_norm.rms_norm(x, weight, 1e-5), rms_norm_reference(x.double(), weight.double(), 1e-5).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_strided_heads(dtype: torch.dtype, device: str) -> None:
    """Query heads inside the merged projection, and the float32 factor `1 + weight` of Gemma."""
    qkv = normal((5, 9, 24), dtype, device)
    factor = 1.0 + normal((24,), torch.float32, device, 1)
    actual = rms_norm.rms_norm(qkv[:, 2:7], factor, 1e-5)
    assert actual.is_contiguous()
    check(actual, rms_norm_reference(qkv[:, 2:7], factor, 1e-5))
    check(rms_norm.rms_norm(qkv[:, :, ::2], factor[:12], 1e-5), rms_norm_reference(qkv[:, :, ::2], factor[:12], 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, REAL])
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x, residual, weight = (normal(size, dtype, device, seed) for seed, size in enumerate((shape, shape, shape[1:])))
    before = x.clone(), residual.clone()
    normalized, total = rms_norm.add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = add_rms_norm_reference(*before, weight, 1e-5)
    check(normalized, expected)
    check(total, expected_total)
    if device == "cuda" or dtype == torch.float32:
        assert torch.equal(total, expected_total)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, REAL])
def test_quantization(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x = normal(shape, dtype, device)
    check_quantized(fp8.per_token_quantize_fp8(x), x)


def test_quantization_of_many_rows(device: str) -> None:
    """Several rows a program, and the last one not full."""
    x = normal((5000, 5), torch.bfloat16, device)
    check_quantized(fp8.per_token_quantize_fp8(x), x)


def test_quantization_of_extremes(device: str) -> None:
    """A row of zeros stays zero, the largest number of a row becomes 448, denormal rows do not overflow."""
    x = torch.tensor([[0.0, 0.0], [-7.0, 3.5], [1e-44, 0.0], [3e38, -1e38]], device=device)
    values, scales = fp8.per_token_quantize_fp8(x)
    check_quantized((values, scales), x)
    assert values.float()[:2].tolist() == [[0.0, 0.0], [-448.0, 224.0]]
    assert bool(scales.isfinite().all()) and bool((scales > 0).all())
    assert not bool(values.float().isnan().any())


def test_quantization_of_every_second_column(device: str) -> None:
    x = normal((6, 20), torch.float32, device)
    check_quantized(fp8.per_token_quantize_fp8(x[::2, 1::2]), x[::2, 1::2])


@pytest.mark.parametrize("shape", [(1, 5), (2, 64), (17, 33), REAL])
def test_fused_quantization_is_the_separate_one(shape: tuple[int, int], device: str) -> None:
    x, residual, weight = (
        normal(size, torch.bfloat16, device, seed) for seed, size in enumerate((shape, shape, shape[1:]))
    )
    values, scales = rms_norm.rms_norm_fp8(x, weight, 1e-5)
    check_quantized((values, scales), rms_norm.rms_norm(x, weight, 1e-5))
    values, scales, total = rms_norm.add_rms_norm_fp8(x, residual, weight, 1e-5)
    normalized, expected_total = rms_norm.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    check_quantized((values, scales), normalized)
    plain, values, scales, total = rms_norm.add_rms_norm_both(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    check_last_bits(plain, normalized)
    check_quantized((values, scales), plain)
    plain, values, scales = rms_norm.rms_norm_both(x, weight, 1e-5)
    check_last_bits(plain, rms_norm.rms_norm(x, weight, 1e-5))
    check_quantized((values, scales), plain)
    gate_up = torch.cat((x, residual), dim=1)
    check_quantized(activation.silu_and_mul_fp8(gate_up), activation.silu_and_mul(gate_up))
    check_quantized(activation.gelu_tanh_and_mul_fp8(gate_up), activation.gelu_tanh_and_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(0, 8), (1, 6), (3, 46), (2, 2, 8), pytest.param((64, 28672), marks=pytest.mark.gpu)]
)
def test_activations(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    gate_up = normal(shape, dtype, device)
    check(activation.silu_and_mul(gate_up), silu_and_mul_reference(gate_up))
    check(activation.gelu_tanh_and_mul(gate_up), gelu_tanh_and_mul_reference(gate_up))


def test_activation_of_a_slice(device: str) -> None:
    wide = normal((4, 20), torch.float32, device)
    check(activation.silu_and_mul(wide[1:3, 4:16]), silu_and_mul_reference(wide[1:3, 4:16]))


def angles(num_tokens: int, head_dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    turns = normal((num_tokens, head_dim // 2), torch.float32, device, 7)
    cos = torch.cat((turns.cos(), turns.cos()), dim=-1)[:, None]
    return cos, torch.cat((-turns.sin(), turns.sin()), dim=-1)[:, None]


@pytest.mark.parametrize(("num_tokens", "half"), [(0, 2), (1, 1), (7, 6), pytest.param(300, 64, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_rotation(num_tokens: int, half: int, factor: float, device: str) -> None:
    positions = (torch.arange(num_tokens, device=device) * 977) % 131072
    frequencies = (500000.0 ** -(torch.arange(half) / half)).to(device)
    actual, expected = (find(positions, frequencies, factor) for find in (rope.rotation, rotation_torch))
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape == (num_tokens, 1, 2 * half)
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "head_dim"),
    [(0, 2, 4), (1, 1, 2), (3, 5, 12), (17, 3, 16), pytest.param(129, 40, 128, marks=pytest.mark.gpu)],
)
def test_rope(num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    """Heads inside a wider tensor, which is not touched."""
    qkv = normal((num_tokens, num_heads + 3, head_dim), dtype, device)
    before = qkv.clone()
    cos, signed_sin = angles(num_tokens, head_dim, device)
    expected = apply_rope_reference(before[:, 1 : num_heads + 1], cos, signed_sin)
    actual = rope.apply_rope(qkv[:, 1 : num_heads + 1], cos, signed_sin)
    assert actual.is_contiguous()
    check(actual, expected)
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("block_shape", [(4, 2, 6), pytest.param((32, 8, 128), marks=pytest.mark.gpu)])
def test_copy_blocks(block_shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    tensors = [normal((6, *block_shape), torch.float32, device, seed).to(dtype) for seed in range(4)]
    before = [tensor.clone().view(torch.uint8) for tensor in tensors]
    pairs = torch.tensor([[5, 2], [1, 3]], device=device)
    kv_cache.copy_blocks(tensors, *pairs.unbind(1))
    for new, old in zip(tensors, before, strict=True):
        assert torch.equal(new.view(torch.uint8), old[[0, 1, 5, 1, 4, 5]])


def test_copy_no_blocks(device: str) -> None:
    tensor = normal((2, 4, 2, 4), torch.float32, device)
    before = tensor.clone()
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    kv_cache.copy_blocks([tensor], nothing, nothing)
    assert torch.equal(tensor, before)
