"""What decoded weights take is what `TorchProgram` keeps of them."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from tests.support.tiny_models import tiny_hf_model
from tokenmill.builder.build import build
from tokenmill.runtime import torch_operations
from tokenmill.runtime.program_loading import load_torch_program
from tokenmill.runtime.weight_decoding import decoded_nbytes

pytestmark = pytest.mark.spec("C3")


def held_bytes() -> int:
    """Of all tensors that are alive."""
    gc.collect()
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors()}
    return sum(storages.values())


def tensors() -> list[torch.Tensor]:
    return [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]


@pytest.mark.parametrize("model", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "q8_0"])
def test_the_weights_of_an_engine_for_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, dtype: str, quantization: str
) -> None:
    # Rows of whole blocks, so that a CPU keeps no more of them than a GPU.
    tiny_hf_model(model, hidden_size=96, intermediate_size=64, tie_word_embeddings=True).save_pretrained(tmp_path)
    engine = build(
        tmp_path, device="cuda", dtype=dtype, quantization=quantization, capture="dispatch", opt_level=1, max_seq_len=64
    )
    # As on a GPU: a CPU would keep matrices in its own order.
    monkeypatch.setattr(torch_operations, "pack_linear_weight", lambda weight, batch_invariant: weight)
    monkeypatch.setattr(torch_operations.ExpertWeights, "prepared", lambda weights: weights)
    before = held_bytes()
    program = load_torch_program(engine, torch.device("cpu"), attn_backend="cpu")
    assert held_bytes() - before == pytest.approx(decoded_nbytes(program.program), rel=0.02)
    if quantization != "none":
        assert decoded_nbytes(program.program) > 1.5 * engine.weight_nbytes
