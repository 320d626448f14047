"""Qwen3-30B-A3B's shape (128 experts, 8 for each token) with random weights on one GPU: latency, throughput, start.

    python -m benchmarks.gpu.qwen3_moe --quantization fp8 --work 128/128/1 1000/1000/256 --kv-dtype fp8 --profile 1 256

Options and rules are those of `benchmarks.gpu.llama8b`.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.llama8b import Shape, parse_arguments, run

QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rope_scaling": None, "attention_bias": False,
    "use_sliding_window": False, "sliding_window": None, "tie_word_embeddings": False, "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}  # fmt: skip

QWEN3 = Shape(
    "Qwen3 30B-A3B",
    "qwen3_moe",
    QWEN3_30B_A3B,
    {
        ("tpot", "128/128/1", "fp8"): (3.0, {"vLLM 0.26": 4.77}, 1.1),
        ("throughput", "1000/1000/256", "fp8"): (14000.0, {"vLLM 0.26": 12877.0}, 15800.0),
        ("start", "", "fp8"): (25.0, {"vLLM 0.26": 137.0}, None),
    },
)
"""Limits at 3.06 TB/s: 3.36 GB of weights a token; a step of 256 reads 30 GB of weights and 19 GB of float8 cache."""


def main() -> None:
    """Measure, print, write."""
    run(QWEN3, parse_arguments(__doc__))


if __name__ == "__main__":
    main()
