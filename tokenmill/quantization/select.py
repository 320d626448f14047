"""From the name of a quantization to the methods of a model's linear layers. Called where a model is built."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from tokenmill.errors import InvalidParameterError, did_you_mean
from tokenmill.quantization.base import ExpertsMethod, ExpertsMethodFactory, LinearMethod, LinearMethodFactory
from tokenmill.quantization.checkpoint_format import Fp8Format
from tokenmill.quantization.fp8 import Fp8Experts, Fp8Linear
from tokenmill.quantization.fp8_checkpoint import BlockFp8Linear, CheckpointFp8Experts, ScaledFp8Linear
from tokenmill.quantization.unquantized import UnquantizedExperts, UnquantizedLinear

Quantization: TypeAlias = Literal["none", "fp8"]


def linear_method_for(
    name: Quantization | None, *, quantize_lm_head: bool = False, batch_invariant: bool = False
) -> LinearMethodFactory:
    """What makes the method of each linear layer when the weights are quantized as they are loaded.

    Args:
        name: `fp8`: 8-bit floats (`quantization.fp8`); `none` or None: weights stay in the model's type.
        quantize_lm_head: quantize the output head too. Logits are where rounding shows most, so it is not the default.
        batch_invariant: give each row the same bits in any company.

    Raises:
        InvalidParameterError: no such quantization (`field` is `quantization`).
    """
    if name is None or name == "none":
        return lambda layer_name: UnquantizedLinear(batch_invariant=batch_invariant)
    if name != "fp8":
        raise InvalidParameterError(
            f"The quantization '{name}' is not supported.",
            field="quantization",
            remedy=did_you_mean(name, get_args(Quantization)),
        )

    def method_of(layer_name: str) -> LinearMethod:
        is_head = layer_name.rpartition(".")[2] == "lm_head"
        make = UnquantizedLinear if is_head and not quantize_lm_head else Fp8Linear
        return make(batch_invariant=batch_invariant)

    return method_of


def experts_method_for(name: Quantization | None, *, batch_invariant: bool = False) -> ExpertsMethodFactory:
    """What makes the method of the experts of each layer, as `linear_method_for` does for linear layers."""
    linear_method_for(name)  # refuses what does not exist
    make = UnquantizedExperts if name in (None, "none") else Fp8Experts
    return lambda layer_name: make(batch_invariant=batch_invariant)


def methods_for(
    name: Quantization | None, stored: Fp8Format | None, *, batch_invariant: bool = False
) -> tuple[LinearMethodFactory, ExpertsMethodFactory]:
    """What makes the methods of a model's linear layers and experts.

    Args:
        name: as for `linear_method_for`; what is quantized in the checkpoint stays as it is there.
        stored: how the checkpoint is quantized; None: it is not.
        batch_invariant: give each row the same bits in any company.
    """
    linear = linear_method_for(name, batch_invariant=batch_invariant)
    experts = experts_method_for(name, batch_invariant=batch_invariant)
    if stored is None:
        return linear, experts

    def linear_method(layer_name: str) -> LinearMethod:
        if not stored.covers(layer_name):
            return linear(layer_name)
        make = BlockFp8Linear if stored.weight_scales == "block" else ScaledFp8Linear
        return make(stored, batch_invariant=batch_invariant)

    def experts_method(layer_name: str) -> ExpertsMethod:
        # The list of what is not quantized names single projections of single experts: one stands for all.
        if not stored.covers(f"{layer_name}.0.gate_proj"):
            return experts(layer_name)
        return CheckpointFp8Experts(stored, batch_invariant=batch_invariant)

    return linear_method, experts_method
