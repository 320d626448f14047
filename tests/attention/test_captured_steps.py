"""Steps as graphs compute them, padded and with rows told apart on the device, give the tokens of steps as planned.

Whole models, in the interpreter; graphs themselves are tested on a GPU (tests/gpu/test_large_steps.py).
"""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny_models import build_model, tiny_hf_model
from tests.support.tiny_programs import tiny_program
from tokenmill.attention.base import AttentionBackend, TurnsHeads
from tokenmill.attention.cpu import CpuAttention
from tokenmill.engine.plan import BatchPlan, NewSlot, Row
from tokenmill.kv_cache.tensors import allocate_caches
from tokenmill.layers.attention import Attention
from tokenmill.models.config import ModelConfig
from tokenmill.runtime import step_sizes
from tokenmill.runtime.model_runner import ModelRunner, StepModel
from tokenmill.runtime.slot_state import SlotState
from tokenmill.runtime.step_graphs import StepGraphs
from tokenmill.runtime.torch_program import TorchProgram
from tokenmill.sampling.slot_params import SlotSamplingParams
from tokenmill.sampling_params import SamplingParams

pytest.importorskip("triton")
from tokenmill.attention.triton import TritonAttention

pytestmark = [
    pytest.mark.spec("H3"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled for the GPU in this process"),
]
CPU = torch.device("cpu")


def new_slot(slot: int, count: int, block_ids: list[int]) -> NewSlot:
    token_ids = tuple((7 * slot + 5 * index) % 61 for index in range(count))
    return NewSlot(slot, token_ids, count, tuple(block_ids), SamplingParams(max_tokens=9), 0, 0, ())


PLANS = (
    BatchPlan(0, (Row(0, 0, 3, True), Row(1, 0, 11, False)), (new_slot(0, 3, [1]), new_slot(1, 19, [2, 3]))),
    BatchPlan(1, (Row(0, 3, 1, True), Row(1, 11, 8, True), Row(2, 0, 5, True)), (new_slot(2, 5, [4]),)),
    BatchPlan(2, (Row(0, 4, 1, True), Row(1, 19, 1, True), Row(2, 5, 1, True))),
)
"""A prompt and a chunk of another; one token, the rest of the chunk and a new prompt; one token each."""


def make_runner(model_type: str, backend: AttentionBackend, *, as_program: bool = False) -> ModelRunner:
    hf_model = tiny_hf_model(model_type)
    config = ModelConfig.from_hf(hf_model.config.to_dict())
    model: StepModel
    if as_program:
        model = TorchProgram(*tiny_program(config, hf_model.state_dict()), backend)
    else:
        model = layers = build_model(hf_model.config.to_dict(), hf_model.state_dict())
        for layer in layers.modules():
            if isinstance(layer, Attention):
                layer.backend = backend
                layer._turning_backend = backend if isinstance(backend, TurnsHeads) else None
    caches = allocate_caches(
        config.num_layers, 8, 16, config.num_key_value_heads, config.head_dim, torch.float32, CPU
    )  # fmt: skip
    return ModelRunner(model, caches, SlotState(4, 64, 16, CPU), SlotSamplingParams(5, config.vocab_size, CPU))


@pytest.mark.parametrize(
    ("model_type", "as_program"),
    [("llama", False), ("qwen3_moe", False), ("gemma3_text", False), ("llama", True), ("gemma3_text", True)],
)
def test_padded_steps_give_the_same_tokens(model_type: str, as_program: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma has a sliding window, a mixture routes what pads a step like all else; also as a built engine computes."""
    planned = make_runner(model_type, CpuAttention())
    padded = make_runner(model_type, TritonAttention(), as_program=as_program)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(step_sizes, "SHORT_ROWS", (1,))
    for plan in PLANS:
        # Each step is the first of its size: it runs without a graph.
        graphs = padded._graphs = StepGraphs(padded._step, padded._slots, 4, 600)
        size = graphs.size_of(plan.rows, greedy=True)
        assert size is not None and (size.num_prompts > 0) == (plan.step < 2)
        expected, found = planned.run(plan), padded.run(plan)
        assert [row.token_id for row in found.rows] == [row.token_id for row in expected.rows]
