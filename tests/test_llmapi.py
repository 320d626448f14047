"""Scripts written for TensorRT-LLM's LLM API run after the import is changed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenmill.llmapi import LLM

pytestmark = pytest.mark.spec("H6")

QUICK_START = """
from tensorrt_llm import LLM, SamplingParams

prompts = ["Hello, my name is", "The president of the United States is", "The future of AI is"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
llm = LLM(model=MODEL)
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
llm.shutdown()
"""

CONFIGURED = """
from tensorrt_llm import LLM, SamplingParams
from tensorrt_llm.llmapi import CapacitySchedulerPolicy, KvCacheConfig, SchedulerConfig

kv_cache_config = KvCacheConfig(enable_block_reuse=True, free_gpu_memory_fraction=0.5)
kv_cache_config.max_tokens = 512
scheduler_config = SchedulerConfig(capacity_scheduler_policy=CapacitySchedulerPolicy.MAX_UTILIZATION)
with LLM(
    model=MODEL, tensor_parallel_size=1, kv_cache_config=kv_cache_config, scheduler_config=scheduler_config,
    max_batch_size=4, max_num_tokens=256, enable_chunked_prefill=True, backend="pytorch", trust_remote_code=True,
) as llm:
    params = SamplingParams(
        max_tokens=8, n=2, best_of=3, top_k=20, temperature=1.0, seed=1, logprobs=1, end_id=-1 % 300, stop=["zzz"],
        return_perf_metrics=True, exclude_input_from_output=True, use_beam_search=False,
    )
    (output,) = llm.generate([[5, 6, 7]], sampling_params=params, use_tqdm=False)
    assert len(output.outputs) == 2
    for completion in output.outputs:
        assert completion.length == len(completion.token_ids) == len(completion.logprobs)
        entry = completion.logprobs[0][completion.token_ids[0]]
        assert entry.logprob <= 0 and entry.rank >= 1
    print(output.request_id, output.finished, output.outputs[0].finish_reason, output.outputs[0].cumulative_logprob)
"""

BUILT = """
from tensorrt_llm import LLM, SamplingParams
from tensorrt_llm.llmapi import BuildConfig, KvCacheConfig

build_config = BuildConfig(max_batch_size=4, max_num_tokens=256)
build_config.max_input_len = 24
build_config.max_seq_len = 64
llm = LLM(model=MODEL, build_config=build_config, kv_cache_config=KvCacheConfig(max_tokens=512))
for output in llm.generate(["the rain in", "a stitch"], SamplingParams(max_tokens=8, end_id=7)):
    print(output.finished, output.outputs[0].finish_reason)
assert llm.max_seq_len == 64
try:
    llm.generate([[5] * 25])
except ValueError as error:
    assert "24" in str(error)
else:
    raise AssertionError("max_input_len was ignored")
llm.save(FOLDER)
"""


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> Iterator[Any]:
    with LLM(model_dir, dtype="float32", device="cpu", kv_cache_config={"max_tokens": 1024}) as llm:
        yield llm


@pytest.mark.parametrize("script", [QUICK_START, CONFIGURED, BUILT], ids=["quick start", "configured", "built"])
def test_script_runs_after_changing_the_import(
    script: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = script.replace("tensorrt_llm", "tokenmill").replace("MODEL", repr(str(model_dir)))
    changed = changed.replace("FOLDER", repr(str(tmp_path / "engine")))
    exec(compile(changed, "script.py", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert re.search(r"Generated text: '|True (length|stop)", printed), printed


def test_asynchronous_use_as_in_its_examples(llm: Any) -> None:
    from tokenmill.llmapi import SamplingParams

    async def task(prompt: str) -> str:
        text = ""
        async for output in llm.generate_async(prompt, SamplingParams(max_tokens=6, ignore_eos=True), streaming=True):
            text = output.outputs[0].text
        return text

    async def main() -> list[str]:
        return await asyncio.gather(*(task(prompt) for prompt in ("a b c", "the rain", "x")))

    texts = asyncio.run(main())
    assert texts == [
        output.outputs[0].text
        for output in llm.generate(["a b c", "the rain", "x"], SamplingParams(max_tokens=6, ignore_eos=True))
    ]
    future = llm.generate_async("a b c", SamplingParams(max_tokens=6, ignore_eos=True))
    assert future.result(timeout=30).outputs[0].text == texts[0]
    assert future.finished
    assert future.outputs[0].text == texts[0]
