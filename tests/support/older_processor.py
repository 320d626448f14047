"""Processes in which tokenmill takes this x86 machine for an older one.

As a pytest plugin (`-p tests.support.older_processor`) it is one of 2013, with AVX2 and nothing newer. As a program,
`python -m tests.support.older_processor NAME MODEL ...`, it prints the greedy tokens of `LLM(MODEL, ...)` as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import llvmlite.binding

ROOT: Final = Path(__file__).parents[2]
AVX2: Final = "haswell"
PORTABLE: Final = "x86-64"
FEATURES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({
    AVX2: (
        "avx", "avx2", "bmi", "bmi2", "cx16", "f16c", "fma", "lzcnt", "movbe", "popcnt", "sse4.1", "sse4.2", "ssse3",
    ),
    PORTABLE: ("cx8", "fxsr", "mmx", "sse", "sse2"),
})  # fmt: skip
"""What processors have, by LLVM's name of them."""

PROMPTS: Final = tuple([(7 * index + 13 * length) % 300 for index in range(length)] for length in (1, 7, 40))
TEXTS: Final = ("The capital of France is", "def fibonacci(n):", "Water is made of hydrogen and")
"""For tiny models, and for real ones."""


class Features(dict[str, bool]):
    """As llvmlite gives them."""

    def flatten(self, sort: bool = True) -> str:
        """In LLVM's notation."""
        return ",".join(f"+{name}" for name in self)


def environment() -> dict[str, str]:
    """Of a process that finds these sources."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def pretend(name: str) -> None:
    """Take this processor for one of `FEATURES`. Nothing of tokenmill has been imported yet."""
    llvmlite.binding.get_host_cpu_features = lambda: Features(dict.fromkeys(FEATURES[name], True))
    llvmlite.binding.get_host_cpu_name = lambda: name


def pytest_configure() -> None:
    """Of pytest."""
    pretend(AVX2)


def greedy_tokens(model: Any, **options: Any) -> dict[str, Any]:
    """Instructions of the kernels, and the tokens of a few prompts by the compiled engine."""
    from tokenmill import LLM, KvCacheConfig, SamplingParams
    from tokenmill.ops.cpu.cpu_features import best_dot_product

    params = SamplingParams(max_tokens=12, ignore_eos=True)
    cache = KvCacheConfig(max_tokens=512, tokens_per_block=16, dtype="float32")
    prompts: Any = TEXTS if str(model).endswith(".gguf") else PROMPTS
    with LLM(model, backend="engine", device="cpu", max_seq_len=128, kv_cache_config=cache, **options) as llm:
        outputs: Any = llm.generate([*prompts], params, use_tqdm=False)
    tokens = [output.outputs[0].token_ids for output in outputs]
    return {"kernels": best_dot_product().name.lower(), "tokens": tokens}


if __name__ == "__main__":
    pretend(sys.argv[1])
    sys.stdout.write(json.dumps([greedy_tokens(argument, num_threads=1) for argument in sys.argv[2:]]))
