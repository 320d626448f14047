"""`LLM` on a tiny random model: inputs, streaming, sampling, log-probabilities and cancelling, against transformers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenmill import LLM, KvCacheConfig, RequestOutput, SamplingParams
from tokenmill.engine.core import EngineCore
from tokenmill.engine.events import EngineEvent
from tokenmill.errors import InvalidParameterError, UnknownParameterError

pytestmark = pytest.mark.spec("A1")

TEXTS = ["the quick brown fox", "a stitch in time", "rain"]


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> Iterator[LLM]:
    with make_llm(model_dir) as llm:
        yield llm
        llm.check_integrity()
        assert llm.stats().num_running == llm.stats().num_waiting == 0


def make_llm(model_dir: Path, **changes: Any) -> LLM:
    cache = KvCacheConfig(max_tokens=2048, tokens_per_block=16)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_batch_size": 8, "kv_cache_config": cache}
    return LLM(model_dir, **{**options, **changes})


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def reference_logprobs(reference: Any, token_ids: list[int]) -> torch.Tensor:
    """[T, vocab]: log-probabilities of the token after each position."""
    with torch.inference_mode():
        return torch.log_softmax(reference(torch.tensor([token_ids])).logits[0], -1)


def test_every_kind_of_input_in_one_batch(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(TEXTS[0])
    messages = [{"role": "user", "content": "the rain"}]
    params = SamplingParams(max_tokens=6)
    outputs = llm.generate(
        [
            *(TEXTS[0], ids, tuple(ids), np.array(ids), torch.tensor(ids), list(np.array(ids))),
            {"prompt": TEXTS[0]},
            {"prompt_token_ids": ids},
            {"prompt": TEXTS[0], "prompt_token_ids": None},  # as vLLM's users write it
            messages,
        ],
        params,
    )
    assert [output.prompt_token_ids for output in outputs[:-1]] == [ids] * 9
    assert all(type(token) is int for output in outputs for token in output.prompt_token_ids)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs[:-1]}) == 1
    assert outputs[0].prompt == outputs[8].prompt == TEXTS[0]
    assert outputs[1].prompt is None
    chat = llm.chat(messages, params)
    assert isinstance(chat, RequestOutput)
    assert chat.outputs[0].token_ids == outputs[-1].outputs[0].token_ids
    later = llm.chat_async(messages, params, streaming=True)
    assert "".join(output.outputs[0].text_diff for output in later) == chat.outputs[0].text
    several = llm.chat([messages, messages], params)
    assert isinstance(several, list)
    assert [one.outputs[0].text for one in several] == [chat.outputs[0].text] * 2


def test_one_prompt_gives_one_output_and_a_list_gives_a_list(llm: LLM) -> None:
    assert isinstance(llm.generate(TEXTS[0]), RequestOutput)
    assert isinstance(llm.generate([1, 2, 3]), RequestOutput)
    assert len(llm.generate([TEXTS[0]])) == 1
    assert llm.generate([]) == []
    for array in (np.array, torch.tensor):
        assert isinstance(llm.generate(array([1, 2, 3])), RequestOutput)
        batch = llm.generate(array([[1, 2, 3], [4, 5, 6]]))
        assert [output.prompt_token_ids for output in batch] == [[1, 2, 3], [4, 5, 6]]


def test_parameters_for_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (1, 5, 9)]
    assert [output.outputs[0].length for output in llm.generate(TEXTS, params)] == [1, 5, 9]


def test_streams_in_threads_and_event_loops_add_up_to_the_whole(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    whole = llm.generate(TEXTS[1], params).outputs[0]

    async def stream() -> tuple[str, list[int]]:
        text, ids = "", []
        async for output in llm.generate_async(TEXTS[1], params, streaming=True):
            text += output.outputs[0].text_diff
            ids += output.outputs[0].token_ids_diff
        return text, ids

    assert asyncio.run(stream()) == (whole.text, whole.token_ids)
    parts = [output.outputs[0].text_diff for output in llm.generate_async(TEXTS[1], params, streaming=True)]
    assert "".join(parts) == whole.text

    async def wait() -> str:
        return (await llm.generate_async(TEXTS[1], params)).outputs[0].text

    assert asyncio.run(wait()) == whole.text


def test_a_stream_gives_each_step_as_it_ends(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=1.0, seed=7)  # greedy tokens may come in groups
    whole = llm.generate(TEXTS[1], params).outputs[0]
    was_read = threading.Event()
    advance = EngineCore.advance
    has_given = False

    def advance_when_read(engine: EngineCore) -> list[EngineEvent]:
        nonlocal has_given
        assert not has_given or was_read.wait(30.0), "the reader got nothing of a step that has ended"
        was_read.clear()
        events = advance(engine)
        has_given = bool(events)
        return events

    monkeypatch.setattr(EngineCore, "advance", advance_when_read)
    texts, counts = [], []
    for output in llm.generate_async(TEXTS[1], params, streaming=True):
        texts.append(output.outputs[0].text_diff)
        counts.append(len(output.outputs[0].token_ids_diff))
        was_read.set()
    assert "".join(texts) == whole.text
    assert [count for count in counts if count] == [1] * 20
    assert sum(bool(text) for text in texts) > 5


def test_logprobs_are_those_of_transformers(llm: LLM, reference: Any) -> None:
    output = llm.generate(TEXTS[0], SamplingParams(max_tokens=8, logprobs=3, prompt_logprobs=2, ignore_eos=True))
    completion = output.outputs[0]
    tokens = output.prompt_token_ids + completion.token_ids
    expected = reference_logprobs(reference, tokens)
    num_prompt = len(output.prompt_token_ids)
    assert len(completion.logprobs) == 8
    assert len(completion.prompt_logprobs) == num_prompt - 1
    for entries, top, first in ((completion.prompt_logprobs, 2, 0), (completion.logprobs, 3, num_prompt - 1)):
        for index, entry in enumerate(entries, start=first):
            for token, logprob in entry.items():
                assert logprob.logprob == pytest.approx(expected[index, token].item(), abs=1e-4)
                assert logprob.rank == 1 + int((expected[index] > expected[index, token]).sum())
            assert tokens[index + 1] in entry
            assert set(expected[index].topk(top).indices.tolist()) <= set(entry)
    total = sum(expected[num_prompt - 1 + i, token].item() for i, token in enumerate(completion.token_ids))
    assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_prompt_logprobs_do_not_depend_on_the_cache_or_on_chunks(model_dir: Path, llm: LLM) -> None:
    prompt = list(range(10, 90))
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    first, second = (llm.generate(prompt, params).outputs[0].prompt_logprobs for _ in range(2))
    with make_llm(model_dir, max_num_tokens=13) as chunked:
        third = chunked.generate(prompt, params).outputs[0].prompt_logprobs
    assert len(first) == len(second) == len(third) == 79
    for one, two, three, token in zip(first, second, third, prompt[1:], strict=True):
        assert one[token].logprob == pytest.approx(two[token].logprob, abs=1e-5)
        assert one[token].logprob == pytest.approx(three[token].logprob, abs=1e-4)


def test_a_seed_repeats_a_request_whatever_runs_beside_it(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=7, ignore_eos=True)
    alone = llm.generate(TEXTS[0], params).outputs[0].token_ids
    crowd = [SamplingParams(max_tokens=12, temperature=1.5, seed=seed) for seed in range(5)]
    batch = llm.generate([*TEXTS, *TEXTS[:2], TEXTS[0]], [*crowd, params])
    assert batch[-1].outputs[0].token_ids == alone
    fresh = {
        tuple(llm.generate(TEXTS[0], SamplingParams(max_tokens=12, temperature=1.0)).outputs[0].token_ids)
        for _ in range(4)
    }
    assert len(fresh) > 1


def test_n_gives_different_sequences_and_best_of_the_most_likely(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=10, ignore_eos=True, logprobs=0)
    four = llm.generate(TEXTS[0], params).outputs
    assert [output.index for output in four] == [0, 1, 2, 3]
    assert len({tuple(output.token_ids) for output in four}) > 1
    best = SamplingParams(n=2, best_of=4, temperature=1.0, seed=3, max_tokens=10, ignore_eos=True)
    two = llm.generate(TEXTS[0], best).outputs
    ranked = sorted(four, key=lambda output: -(output.cumulative_logprob or 0.0))
    assert [output.token_ids for output in two] == [output.token_ids for output in ranked[:2]]


def test_stop_strings_stop_tokens_and_end_tokens(llm: LLM) -> None:
    plain = llm.generate(TEXTS[0], SamplingParams(max_tokens=24, ignore_eos=True)).outputs[0]
    stop = plain.text[5:8]
    cut = llm.generate(TEXTS[0], SamplingParams(max_tokens=24, ignore_eos=True, stop=stop)).outputs[0]
    assert cut.text == plain.text[: plain.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = llm.generate(
        TEXTS[0], SamplingParams(max_tokens=24, ignore_eos=True, stop=[stop], include_stop_str_in_output=True)
    ).outputs[0]
    assert kept.text == plain.text[: plain.text.index(stop)] + stop
    for min_tokens in (4, 20):
        params = SamplingParams(max_tokens=24, min_tokens=min_tokens, ignore_eos=True, stop=stop)
        whole = llm.generate(TEXTS[0], SamplingParams(max_tokens=min_tokens, ignore_eos=True)).outputs[0].text
        later = llm.generate(TEXTS[0], params).outputs[0]
        assert later.text == whole + plain.text[len(whole) :].partition(stop)[0]
        assert later.length >= min_tokens
    token = plain.token_ids[6]
    at = plain.token_ids.index(token)
    by_token = llm.generate(TEXTS[0], SamplingParams(max_tokens=24, ignore_eos=True, stop_token_ids=[token])).outputs[0]
    assert (by_token.token_ids, by_token.stop_reason) == (plain.token_ids[:at], token)
    by_end = llm.generate(TEXTS[0], SamplingParams(max_tokens=24, end_id=token)).outputs[0]
    assert (by_end.token_ids, by_end.finish_reason, by_end.stop_reason) == (plain.token_ids[:at], "stop", None)
    late = SamplingParams(max_tokens=24, ignore_eos=True, stop_token_ids=[token], min_tokens=at + 5)
    assert llm.generate(TEXTS[0], late).outputs[0].length >= at + 5


def test_bad_words_and_biases_change_the_choice(llm: LLM) -> None:
    plain = llm.generate(TEXTS[0], SamplingParams(max_tokens=8, ignore_eos=True)).outputs[0]
    token = plain.token_ids[0]
    banned = llm.generate(TEXTS[0], SamplingParams(max_tokens=8, ignore_eos=True, bad_token_ids=[token])).outputs[0]
    assert token not in banned.token_ids
    forced = llm.generate(TEXTS[0], SamplingParams(max_tokens=8, ignore_eos=True, logit_bias={65: 1000.0})).outputs[0]
    assert forced.token_ids == [65] * 8


def test_abort_ends_a_request_once_and_frees_its_blocks(llm: LLM) -> None:
    params = SamplingParams(max_tokens=1500, ignore_eos=True)
    result = llm.generate_async("the rain", params, streaming=True)
    next(result)
    assert llm.abort(result)
    output = result.result(timeout=20)
    assert output.outputs[0].finish_reason == "cancelled"
    assert 0 < output.outputs[0].length < 1500
    assert not llm.abort(result)
    assert not result.abort()
    assert not llm.abort(10**9)
    llm.check_integrity()
    assert llm.stats().kv_cache.num_free_blocks == llm.stats().kv_cache.num_blocks


def test_detokenize_off_and_tokenizer_off(model_dir: Path, llm: LLM) -> None:
    output = llm.generate(TEXTS[0], SamplingParams(max_tokens=5, detokenize=False)).outputs[0]
    assert (output.text, output.length) == ("", 5)
    with make_llm(model_dir, skip_tokenizer_init=True) as bare:
        again = bare.generate(llm.generate(TEXTS[0]).prompt_token_ids, SamplingParams(max_tokens=5)).outputs[0]
        assert (again.text, again.token_ids) == ("", output.token_ids)
        with pytest.raises(InvalidParameterError, match="A stop string needs a tokenizer") as caught:
            bare.generate([5], SamplingParams(stop="a"))
        assert caught.value.field == "stop"


def test_truncate_prompt_tokens_keeps_the_last(llm: LLM) -> None:
    output = llm.generate(list(range(20, 60)), SamplingParams(max_tokens=1, truncate_prompt_tokens=4))
    assert output.prompt_token_ids == [56, 57, 58, 59]


def test_answers_end_at_the_context(model_dir: Path) -> None:
    with make_llm(model_dir, max_seq_len=32) as short:
        output = short.generate(list(range(20, 40)), SamplingParams(max_tokens=100, ignore_eos=True)).outputs[0]
        assert (output.length, output.finish_reason) == (12, "length")


def test_two_engines_in_one_process(model_dir: Path, llm: LLM) -> None:
    with make_llm(model_dir) as other:
        params = SamplingParams(max_tokens=10)
        pairs = [(llm.generate_async(text, params), other.generate_async(text, params)) for text in TEXTS]
        for one, two in pairs:
            assert one.result(20).outputs[0].token_ids == two.result(20).outputs[0].token_ids


def test_dummy_weights_need_no_weight_files(model_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    with make_llm(tmp_path, load_format="dummy") as dummy:
        assert dummy.generate(TEXTS[0], SamplingParams(max_tokens=4, ignore_eos=True)).outputs[0].length == 4


def test_what_is_printed_of_an_llm_and_of_a_result_says_what_it_is(llm: LLM) -> None:
    limits = f"max_batch_size=8, max_seq_len={llm.max_seq_len}"
    assert repr(llm) == f"LLM({llm.model_name!r}, backend='engine', device='cpu', {limits})"
    result = llm.generate_async("a", SamplingParams(max_tokens=3, ignore_eos=True))
    result.result()
    assert repr(result) == f"<GenerationResult of request {result.request_id}: 3 tokens, finished>"


def test_a_sampling_parameter_given_to_the_llm_says_where_it_belongs(model_dir: Path) -> None:
    with pytest.raises(UnknownParameterError, match=r"SamplingParams\(temperature=\.\.\.\)") as caught:
        LLM(model_dir, temperature=0.5)
    assert caught.value.field == "temperature"
    with pytest.raises(UnknownParameterError, match="Did you mean 'max_batch_size'"):
        LLM(model_dir, max_batchsize=2)
    with pytest.raises(UnknownParameterError, match="KvCacheConfig has no parameter 'seed'"):
        LLM(model_dir, kv_cache_config={"seed": 1})
