"""`linear_kernels`: which kernel multiplies each linear layer of a model on a GPU, from its configuration alone.

The choices are those of `ops.linear_plan`, by which `ops.linear` and `ops.fp8` decide in every step. Where the GPU's
library multiplies, `ops.product_choices` knows what was measured. Called by `inspection`; imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Final

from tokenmill.models.config import ModelConfig
from tokenmill.models.step_costs import LinearShape, linear_shapes
from tokenmill.ops.linear_plan import InvariantPlan, StreamPlan, invariant_plan, matvec_plan, small_batch_plan
from tokenmill.ops.product_choices import ProductChoice, first_shared_rows

LISTED_ROWS: Final = (1, 2, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 1024, 8192)
"""Numbers of rows around which choices change."""


@dataclass(frozen=True, slots=True)
class MeasuredProduct:
    """What an engine found to be fastest among the library's algorithms.

    Args:
        first_rows, last_rows: numbers of rows for which it is used; the last one was measured.
        algorithm: of cuBLASLt, as text; None: torch's own choice.
        microseconds: that it takes, with a weight that is in no cache.
        torch_microseconds: that torch takes.
    """

    first_rows: int
    last_rows: int
    algorithm: str | None
    microseconds: float
    torch_microseconds: float


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """What multiplies the linear layers of one shape, for a range of rows.

    Args:
        layer: such as `qkv_proj`.
        out_features, in_features: of the weight.
        count: layers of the shape.
        weights: `float8` or `16 bits`.
        first_rows, last_rows: smallest number of rows of the range, and the largest that was looked at.
        kernel: `matvec`, `small_batch`, `invariant`, `cuBLAS` or `_scaled_mm`.
        plan: its tiles; empty for a library's.
        measured: where the kernel is `cuBLAS`: its choices among algorithms that are known, by rows.
    """

    layer: str
    out_features: int
    in_features: int
    count: int
    weights: str
    first_rows: int
    last_rows: int
    kernel: str
    plan: str
    measured: tuple[MeasuredProduct, ...] = ()


def linear_kernels(
    config: ModelConfig,
    *,
    float8: bool,
    deterministic: bool = False,
    dtype: str = "bfloat16",
    measured: Iterable[ProductChoice] = (),
) -> tuple[KernelChoice, ...]:
    """The choices for every linear layer and number of rows.

    Args:
        config: of the model.
        float8: whether the layers that `quantization` covers are float8.
        deterministic: as `LlmArgs.deterministic`.
        dtype: of weights with 16 bits.
        measured: what is known of the library's algorithms on some GPU.
    """
    known = sorted((one for one in measured if one.product.dtype == dtype), key=lambda one: one.product)
    found = []
    for shape in linear_shapes(config):
        is_float8 = float8 and shape.is_quantized
        choices = [(rows, *_choice(shape, rows, is_float8, deterministic)) for rows in LISTED_ROWS]
        of_shape = []
        for (kernel, plan), group in groupby(choices, key=lambda choice: choice[1:]):
            rows = [choice[0] for choice in group]
            of_shape.append(
                KernelChoice(
                    shape.name, shape.out_features, shape.in_features, shape.count,
                    "float8" if is_float8 else "16 bits", rows[0], rows[-1], kernel, plan,
                )
            )  # fmt: skip
        found += _with_measured(of_shape, known)
    return tuple(found)


def _with_measured(of_shape: list[KernelChoice], known: list[ProductChoice]) -> list[KernelChoice]:
    """The choices of one shape, the library's with what is known of it, up to the rows of the next kernel."""
    found = []
    for choice, after in pairwise([*of_shape, None]):
        assert choice is not None
        if choice.kernel == "cuBLAS":
            size, end = (choice.out_features, choice.in_features), after.first_rows if after else 2**31
            choice = replace(
                choice,
                measured=tuple(
                    _measured(one)
                    for one in known
                    if one.product[1:3] == size and choice.first_rows <= one.product.num_rows < end
                ),
            )
        found.append(choice)
    return found


def _measured(choice: ProductChoice) -> MeasuredProduct:
    num_rows = choice.product.num_rows
    return MeasuredProduct(
        first_shared_rows(num_rows),
        num_rows,
        None if choice.algorithm is None else choice.name,
        choice.microseconds,
        choice.torch_microseconds,
    )


def _choice(shape: LinearShape, num_rows: int, float8: bool, deterministic: bool) -> tuple[str, str]:
    """Kernel and plan of one product, as `ops.linear.linear_streamed` and `ops.fp8` choose them."""
    size, weight_bytes = (shape.out_features, shape.in_features), 1 if float8 else 2
    if deterministic:
        return "invariant", _invariant(invariant_plan(num_rows, *size, weight_bytes))
    if num_rows == 1:
        return "matvec", _stream(matvec_plan(*size, weight_bytes))
    plan = small_batch_plan(num_rows, *size, weight_bytes)
    if plan.kernel == "library":
        return ("_scaled_mm" if float8 else "cuBLAS"), ""
    return plan.kernel, _stream(plan)


def _stream(plan: StreamPlan) -> str:
    rows = f" x {plan.block_rows} rows" if plan.kernel == "small_batch" else ""
    splits = f", {plan.num_splits} splits" if plan.num_splits > 1 else ""
    return f"{plan.block_out} x {plan.block_in}{rows}, {plan.num_warps} warps{splits}"


def _invariant(plan: InvariantPlan) -> str:
    splits = f", {plan.num_splits} splits" if plan.num_splits > 1 else ""
    return f"{plan.block_out} x {plan.block_in} x {plan.block_rows} rows, {plan.num_warps} warps{splits}"
