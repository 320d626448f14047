"""An executor that nobody refers to any more ends by itself, wherever the last reference goes, and frees all it had."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.executor.conftest import MODES, NAN_TOKEN, make_llm, wait_until
from tests.executor.test_life import is_alive, running_script
from tests.executor.tiny_executor import PROMPT, make_executor
from tokenmill import LLM, SamplingParams
from tokenmill.errors import InvalidLogitsError
from tokenmill.executor import Request

pytestmark = pytest.mark.spec("A1")

LONG = SamplingParams(max_tokens=1500, ignore_eos=True, bad_token_ids=[NAN_TOKEN], temperature=1.0, seed=3)


@pytest.fixture(autouse=True)
def _collector_is_off() -> Iterator[None]:
    """What is freed here is freed because nothing refers to it, not by the search for cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def threads() -> list[str]:
    """Threads of ours."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("tokenmill"))


def model_of(llm: LLM) -> weakref.ref[Any]:
    """The runner of an engine in this process: the model and its cache."""
    return weakref.ref(llm._executor._engine.runner)  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["engine", "torch"])
def test_an_engine_in_this_process_ends_with_its_llm(model_dir: Path, backend: str) -> None:
    before = threads()
    llm = make_llm(model_dir, backend=backend)
    output = llm.generate("rain", SamplingParams(max_tokens=3, bad_token_ids=[NAN_TOKEN]), timeout=600.0)
    model = model_of(llm)
    assert len(threads()) == len(before) + 2, "the engine and the deadlines"
    del llm
    wait_until(lambda: threads() == before and model() is None)
    assert output.finished


def test_worker_processes_end_with_their_llm(model_dir: Path) -> None:
    before, num_descriptors = threads(), psutil.Process().num_fds()
    llm = make_llm(model_dir, **MODES["1 replica, 2 postproc"])
    stream = llm.generate_async("rain", LONG, streaming=True)
    pids = [process.pid for process in llm.health().processes]
    folder = llm._executor._folder.path  # type: ignore[attr-defined]
    assert len(pids) == 3 and folder.exists()
    del llm
    assert [len(output.outputs[0].token_ids) for output in stream][-1] == 1500, "a stream keeps what it needs"
    wait_until(lambda: threads() == before and psutil.Process().num_fds() == num_descriptors)
    assert not folder.exists()
    assert not any(is_alive(pid) for pid in pids if pid is not None)
    assert not stream.abort(), "it has ended"


def test_a_stream_outlives_its_llm_and_the_engine_not_the_stream(model_dir: Path, reference: LLM) -> None:
    before = threads()
    expected = reference.generate("rain", LONG).outputs[0].token_ids
    llm = make_llm(model_dir)
    model = model_of(llm)
    streams = [llm.generate_async("rain", LONG, streaming=True) for _ in range(2)]
    del llm
    streams.pop()  # nobody reads this one
    outputs = [output.outputs[0] for output in streams[0]]
    assert outputs[-1].token_ids == expected
    wait_until(lambda: threads() == before and model() is None)
    assert streams[0].result().outputs[0].token_ids == expected


def test_an_error_of_a_request_does_not_keep_the_engine(model_dir: Path) -> None:
    before = threads()
    llm = make_llm(model_dir)
    result = llm.generate_async([5, NAN_TOKEN, 6])
    for _ in range(2):
        with pytest.raises(InvalidLogitsError) as caught:
            result.result()
        assert caught.value.__traceback__ is not None
    del llm, caught
    wait_until(lambda: threads() == before)
    assert isinstance(result.exception(), InvalidLogitsError)


def test_an_llm_in_a_cycle_ends_where_the_collector_finds_it(model_dir: Path, reference: LLM) -> None:
    """On the thread of another engine, between two instructions of its step."""
    before = threads()
    llm: Any = make_llm(model_dir)
    model = model_of(llm)
    llm.itself = llm
    del llm
    assert model() is not None and threads() != before
    reference._executor._worker.call(gc.collect)  # type: ignore[attr-defined]
    wait_until(lambda: threads() == before and model() is None)
    reference.check_integrity()


def test_the_end_takes_no_lock_that_its_thread_may_hold(model_dir: Path) -> None:
    """The last reference may go while the same thread is anywhere in the code that talks to the workers."""
    before = threads()
    llm = make_llm(model_dir, num_replicas=1)
    with llm._executor._coordinator._wake_lock:  # type: ignore[attr-defined]
        del llm
    wait_until(lambda: threads() == before)


def test_shutdown_frees_the_model_of_an_llm_that_is_kept(model_dir: Path) -> None:
    before = threads()
    with make_llm(model_dir) as llm:
        model = model_of(llm)
        llm.generate("rain", LONG)
    assert model() is None
    llm.shutdown()
    llm.check_integrity()
    assert llm.stats().num_finished == {"length": 1}
    del llm
    assert threads() == before


def test_the_low_level_executor_ends_too(tiny_model_dir: Path) -> None:
    before = threads()
    executor = make_executor(tiny_model_dir)
    executor.enqueue_request(Request(PROMPT, 100, end_id=-1))
    assert "tokenmill-responses" in threads()
    del executor
    wait_until(lambda: threads() == before)


def test_a_script_that_ends_while_workers_end(model_dir: Path) -> None:
    with running_script(model_dir, "result.abort(); del result, llm") as (process, facts):
        assert process.wait(20.0) == 0
        assert not any(is_alive(pid) for pid in facts["pids"])
        assert not Path(facts["folder"]).exists()
