"""tokenmill's turn in `compare.py`: one measurement of each work through `LLM`, printed as JSON.

python -m benchmarks.cpu.play_tokenmill MODEL --backend engine --threads 2 --seed 0
python -m benchmarks.cpu.play_tokenmill MODEL --backend engine --threads 2 --only-start
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()  # before the imports, which are part of the start

import argparse  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
from collections.abc import Mapping  # noqa: E402

from tokenmill import LLM, KvCacheConfig, SamplingParams  # noqa: E402


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="tokenmill's turn in a comparison.")
    parser.add_argument("model")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-start", action="store_true", help="measure nothing else")
    options = parser.parse_args()
    cache = KvCacheConfig(max_tokens=16 * 320, enable_block_reuse=False)
    with LLM(
        options.model, backend=options.backend, device="cpu", num_threads=options.threads, kv_cache_config=cache,
        max_num_tokens=2048, max_batch_size=16,
    ) as llm:  # fmt: skip
        next(llm.generate_async("Hello", SamplingParams(max_tokens=1), streaming=True))
        start = time.perf_counter() - STARTED
        measured = {} if options.only_start else measure(llm, options.seed)
        print(json.dumps({**measured, "start": start}))


def measure(llm: LLM, seed: int) -> Mapping[str, float]:
    """Tokens a second of each work."""
    generate(llm, seed + 1, num_sequences=1, input_len=32, output_len=8)  # warm-up
    generate(llm, seed + 2, num_sequences=16, input_len=32, output_len=8)
    single = generate(llm, seed + 3, num_sequences=1, input_len=128, output_len=128)
    batch = generate(llm, seed + 4, num_sequences=16, input_len=128, output_len=128)
    prefill = generate(llm, seed + 5, num_sequences=1, input_len=1024, output_len=1)
    return {"decode": 128 / single, "batch": 16 * 128 / batch, "prefill": 1024 / prefill}


def generate(llm: LLM, seed: int, *, num_sequences: int, input_len: int, output_len: int) -> float:
    """Seconds for random prompts and their greedy answers, all at the same time."""
    choose = random.Random(seed)
    vocab_size = llm.description.model.vocab_size
    prompts = [[choose.randrange(3, vocab_size) for _ in range(input_len)] for _ in range(num_sequences)]
    sampling = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    lengths = {len(output.outputs[0].token_ids) for output in outputs}
    if lengths != {output_len}:
        raise SystemExit(f"answers have {lengths} tokens, not {output_len}")
    return seconds


if __name__ == "__main__":
    main()
