"""Matrix product with a weight, and the preparation of a weight for the product that is fastest on its device.

On a CPU with oneDNN a packed weight makes the product 1.2 to 3 times faster in bfloat16 and up to 4 times in float32
than `F.linear`, which reorders the weight on every call. On a GPU products of few rows read the weight once, as fast as
memory gives it; `linear_plan` says which product takes which way. Called by `quantization.unquantized`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from tokenmill.ops import captured
from tokenmill.ops.library_product import add_library_product, library_product
from tokenmill.ops.linear_plan import invariant_plan, matvec_plan, num_arrivals, small_batch_plan
from tokenmill.ops.platform import computes_bfloat16

PACKING_NUM_ROWS = 16
"""Rows of input that the packed layout is made for; one layout serves 1 to 1024 rows without measurable loss."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [O, I] in oneDNN's blocked layout; rows cannot be read from it.

    Args:
        data: the opaque tensor.
        out_features: O.
        in_features: I.
    """

    data: torch.Tensor
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class StreamedWeight:
    """A weight on a GPU with the counters that products of few rows need.

    Args:
        data: [O, I], contiguous.
        arrivals: from `new_arrivals`; belongs to this weight alone.
        batch_invariant: give each row the same bits whatever the number of rows.
    """

    data: torch.Tensor
    arrivals: torch.Tensor
    batch_invariant: bool = False


def linear(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight | StreamedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ weight.T + bias`.

    Args:
        x: [T, I].
        weight: [O, I], plain or prepared.
        bias: [O].

    Returns:
        [T, O], of x's type; sums are accumulated in float32.
    """
    if isinstance(weight, StreamedWeight):
        return linear_streamed(x, weight, bias)
    num_rows = x.shape[0]
    if isinstance(weight, PackedWeight):
        if num_rows == 0:  # oneDNN refuses empty products
            return x.new_empty(0, weight.out_features)
        if num_more := padded_num_rows(num_rows) - num_rows:
            x = functional.pad(x, (0, 0, 0, num_more))
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.data, bias, "none", [], "")
        return product[:num_rows]
    if x.is_meta:
        return captured.linear(x, weight, bias)
    return functional.linear(x, weight, bias)


def padded_num_rows(num_rows: int) -> int:
    """The number of rows that a packed product is computed with: `num_rows`, or a little more.

    oneDNN compiles and keeps a kernel for each number of rows that it meets, 0.4 MiB and milliseconds each. Batches of
    a server have every number; in steps of an eighth they stay few, and the memory of a long run stays flat.
    """
    step = 1 << max(0, num_rows.bit_length() - 4)
    return -(-num_rows // step) * step


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The definition of `linear`, in float32."""
    product = x.float() @ weight.float().T
    return (product if bias is None else product + bias.float()).to(x.dtype)


def linear_streamed(x: torch.Tensor, weight: StreamedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Few rows by the kernels of `ops.triton`, more by cuBLAS; all by one kernel if they shall be invariant."""
    from tokenmill.ops.triton.linear import small_batch
    from tokenmill.ops.triton.matvec import matvec

    num_rows = x.shape[0]
    out_features, in_features = weight.data.shape
    if weight.batch_invariant:
        from tokenmill.ops.triton.linear_invariant import invariant_product

        plan_of_all = invariant_plan(num_rows, out_features, in_features, x.element_size())
        return invariant_product(x, None, weight.data, None, bias, plan_of_all, x.dtype)
    if num_rows == 1:
        return matvec(_rows(x), weight.data, None, bias, matvec_plan(out_features, in_features, x.element_size()))
    plan = small_batch_plan(num_rows, out_features, in_features, x.element_size())
    if plan.kernel == "library":
        return library_product(x, weight.data) if bias is None else functional.linear(x, weight.data, bias)
    return small_batch(_rows(x), None, weight.data, None, bias, weight.arrivals, plan, x.dtype)


def adds_product(num_rows: int, weight: StreamedWeight) -> bool:
    """Whether `add_product` is there for so many rows: where cuBLAS multiplies."""
    if weight.batch_invariant or num_rows == 1:
        return False
    return small_batch_plan(num_rows, *weight.data.shape, weight.data.element_size()).kernel == "library"


def add_product(total: torch.Tensor, x: torch.Tensor, weight: StreamedWeight) -> None:
    """Add `x @ weight.T` to `total` [T, O]; the sum is rounded once. `adds_product` says where that is possible."""
    add_library_product(total, x, weight.data)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """`onednn` (packed weights), `triton` (streamed weights) or `torch` (plain weights)."""
    if device.type == "cuda":
        return "triton" if dtype in (torch.bfloat16, torch.float16) else "torch"
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return "torch"
    is_fast = dtype == torch.float32 or (dtype == torch.bfloat16 and computes_bfloat16(device))
    return "onednn" if is_fast else "torch"


def pack_linear_weight(
    weight: torch.Tensor, *, batch_invariant: bool = False
) -> torch.Tensor | PackedWeight | StreamedWeight:
    """`weight` [O, I] prepared for `linear`: packed into a copy, or itself with what its product needs, or itself.

    Args:
        batch_invariant: the product shall give a row the same bits in any company; on GPUs, in 16 bits.
    """
    implementation = choose(weight.device, weight.dtype)
    if implementation == "triton" and weight.is_contiguous():
        return StreamedWeight(weight.detach(), new_arrivals(weight), batch_invariant)
    assert not batch_invariant, "no product of this device and type is known to be invariant"
    if implementation != "onednn":
        return weight
    data = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKING_NUM_ROWS)
    return PackedWeight(data=data, out_features=weight.shape[0], in_features=weight.shape[1])


def new_arrivals(weight: torch.Tensor) -> torch.Tensor:
    """The counters that a weight [O, I] needs when several programs share its input features."""
    return torch.zeros(num_arrivals(weight.shape[0]), dtype=torch.int32, device=weight.device)
