"""Mixtral (https://arxiv.org/abs/2401.04088): Llama with a mixture of experts in every layer."""

from __future__ import annotations

import re
from typing import Final

from tokenmill.models.llama import LlamaForCausalLM

_PROJECTIONS: Final = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_OLD_NAME: Final = re.compile(r"(.+)\.block_sparse_moe\.(.+)")
_OLD_PROJECTION: Final = re.compile(r"(experts\.\d+)\.(w[123])\.(.+)")


class MixtralForCausalLM(LlamaForCausalLM):
    """Llama's layers with experts; the checkpoints' own names of them are understood."""

    def rename_weight(self, name: str) -> str:
        """`block_sparse_moe` is our `mlp`, `w1`, `w3` and `w2` are gate, up and down projection."""
        old = _OLD_NAME.fullmatch(name)
        if old is None:
            return name
        rest = _OLD_PROJECTION.sub(lambda found: f"{found[1]}.{_PROJECTIONS[found[2]]}.{found[3]}", old[2])
        return f"{old[1]}.mlp.{rest}"


MODEL_CLASS = MixtralForCausalLM
