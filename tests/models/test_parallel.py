"""Two ranks give the logits of one: real processes that talk over Gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.single_thread import single_thread
from tests.support.tiny_models import (
    all_logits,
    build_model,
    random_tokens,
    relative_error,
    sequences_for,
    tiny_hf_model,
)
from tokenmill.parallel.group import ParallelGroup

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_with_biases": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "qwen3_one_kv_head_for_two_ranks": ("qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True, "num_experts": 6}),
    "gemma3_tied": ("gemma3_text", {"sliding_window": 6, "final_logit_softcapping": 20.0}),
}
STEPS = [[("a", 17), ("b", 4)], [("b", 1), ("a", 6)], [("a", 1), ("b", 1)]]
WORLD_SIZE = 2


def run_steps(
    hf_config: dict[str, Any], state_dict: dict[str, torch.Tensor], group: ParallelGroup, expert_parallel: bool = False
) -> torch.Tensor:
    """Logits of every token of every step."""
    model = build_model(hf_config, state_dict, group=group, expert_parallel=expert_parallel)
    num_kv_heads = max(1, model.config.num_key_value_heads // group.size)
    sequences = sequences_for(model, num_kv_heads=num_kv_heads)
    logits = []
    for seed, rows in enumerate(STEPS):
        batch = [(name, random_tokens(count, seed=seed)) for name, count in rows]
        logits.append(all_logits(model, sequences, batch))
    return torch.cat(logits)


def rank_main(rank: int, folder: str) -> None:
    """One process: every model of the folder, as one rank of two."""
    path = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{path / 'store'}", rank=rank, world_size=WORLD_SIZE)
    with single_thread():
        for name in MODELS:
            hf_config, state_dict = torch.load(path / f"{name}.pt", weights_only=False)
            group = ParallelGroup(rank=rank, size=WORLD_SIZE)
            logits = run_steps(hf_config, state_dict, group)
            torch.save(logits, path / f"{name}.rank{rank}.pt")
            if "moe" in name:  # each expert whole on one of the ranks
                assert relative_error(run_steps(hf_config, state_dict, group, expert_parallel=True), logits) < 1e-5
    dist.destroy_process_group()


@pytest.mark.spec("E6")
def test_two_ranks_give_the_logits_of_one(tmp_path: Path) -> None:
    expected = {}
    for name, (model_type, changes) in MODELS.items():
        hf_model = tiny_hf_model(model_type, **changes)
        hf_config, state_dict = hf_model.config.to_dict(), dict(hf_model.state_dict())
        torch.save((hf_config, state_dict), tmp_path / f"{name}.pt")
        expected[name] = run_steps(hf_config, state_dict, ParallelGroup())
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=WORLD_SIZE)
    for name, logits in expected.items():
        ranks = [torch.load(tmp_path / f"{name}.rank{rank}.pt") for rank in range(WORLD_SIZE)]
        assert torch.equal(ranks[0], ranks[1]), name
        assert relative_error(ranks[0], logits) < 1e-5, name
