"""Start and end: what cannot start says why, what ends leaves nothing behind, and no worker outlives its parent."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.executor.conftest import MODES, NAN_TOKEN, make_llm, wait_until
from tests.support.source_tree import ROOT
from tokenmill import SamplingParams
from tokenmill.config import LlmArgs, WorkerConfig
from tokenmill.errors import (
    CheckpointError,
    ExecutorShutdownError,
    InvalidParameterError,
    TokenmillError,
    WorkerStartError,
)
from tokenmill.executor.executor import GenerationExecutor

pytestmark = pytest.mark.spec("B2")

SHORT = SamplingParams(max_tokens=100, ignore_eos=True, bad_token_ids=[NAN_TOKEN])
ENDLESS = SamplingParams(max_tokens=16_000, ignore_eos=True, bad_token_ids=[NAN_TOKEN])


def footprint() -> dict[str, Any]:
    """What this process holds: descriptors, threads, children, folders."""
    gc.collect()
    process = psutil.Process()
    return {
        "descriptors": process.num_fds(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "children": [child.pid for child in process.children(recursive=True)],
        "folders": sorted(path.name for path in Path(tempfile.gettempdir()).glob("tokenmill-ipc-*")),
    }


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("mode", ["in-process", "1 replica", "1 replica, 2 postproc"])
def test_shutdown_lets_running_requests_finish_and_leaves_nothing(model_dir: Path, mode: str) -> None:
    with make_llm(model_dir):  # whatever libraries keep for the life of a process is there from now on
        pass
    before = footprint()
    llm = make_llm(model_dir, **MODES[mode])
    short = [
        llm.generate_async("rain", SamplingParams(max_tokens=100, ignore_eos=True, bad_token_ids=[NAN_TOKEN]))
        for _ in range(4)
    ]
    long = llm.generate_async("rain", ENDLESS, streaming=True)
    next(long)
    started = time.monotonic()
    llm.shutdown(grace_period=1.5)
    assert 1.0 < time.monotonic() - started < 8.0
    assert [result.result(0).outputs[0].length for result in short] == [100] * 4
    with pytest.raises(ExecutorShutdownError):
        long.result(0)
    with pytest.raises(ExecutorShutdownError):
        llm.generate_async("rain")
    with pytest.raises(ExecutorShutdownError):
        llm.check_health()
    assert not llm.abort(long)
    assert llm.stats().num_finished == {"length": 4, "executor_shutdown": 1}
    assert llm.health().state == "unhealthy"
    llm.shutdown()
    del llm, short, long
    assert footprint() == before


def test_what_no_worker_has_yet_ends_at_once(model_dir: Path) -> None:
    with make_llm(model_dir, num_replicas=1) as llm:
        results = [llm.generate_async("rain", ENDLESS) for _ in range(40)]
        wait_until(lambda: llm.stats().num_running)
        time.sleep(0.5)  # for the worker's next heartbeat, after which it is sent all that it may hold
        ending = threading.Thread(target=llm.shutdown, args=(20.0,))
        ending.start()
        # A worker has as many as it can run, and as many to go on with.
        wait_until(lambda: sum(result.done for result in results) == 40 - 2 * 8, 10.0)
        time.sleep(0.2)
        assert sum(result.done for result in results) == 40 - 2 * 8
        llm.shutdown(0.0)  # cuts the other's patience short
        ending.join(5.0)
        assert not ending.is_alive()
        for result in results:
            with pytest.raises(ExecutorShutdownError):
                result.result(0)


def test_leaving_the_block_with_an_error_does_not_wait(model_dir: Path) -> None:
    started = 0.0
    with pytest.raises(KeyboardInterrupt), make_llm(model_dir, worker_config=WorkerConfig(grace_period=60.0)) as llm:
        result = llm.generate_async("rain", ENDLESS)
        started = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - started < 5.0
    with pytest.raises(ExecutorShutdownError):
        result.result(0)


class TestStart:
    """Errors of a start reach the caller as they are, quickly, and nothing stays."""

    def test_the_users_error_comes_from_the_worker(self, model_dir: Path, tmp_path: Path) -> None:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((model_dir / name).read_bytes())
        errors: list[TokenmillError] = []
        for replicas in (0, 1):
            before = footprint()
            with pytest.raises(CheckpointError) as caught:
                make_llm(tmp_path, num_replicas=replicas)
            errors.append(caught.value)
            assert footprint()["children"] == before["children"]
            assert footprint()["folders"] == before["folders"]
        assert errors[0].to_dict() == errors[1].to_dict()

    def test_progress_of_loading_reaches_the_caller(self, model_dir: Path) -> None:
        seen: list[list[tuple[str, int, int]]] = []
        for replicas in (0, 0, 1):  # the first one may compile kernels, which are cached for the others
            calls: list[tuple[str, int, int]] = []
            args = LlmArgs(model=model_dir, num_replicas=replicas, device="cpu", num_threads=1)

            def on_progress(what: str, done: int, total: int, calls: list[tuple[str, int, int]] = calls) -> None:
                calls.append((what, done, total))

            with GenerationExecutor.create(args, None, on_progress) as executor:
                assert executor.generate_async([5, 6]).result(30).outputs[0].token_ids
            seen.append(calls)
        assert seen[1] == seen[2]
        assert len(seen[1]) > 3
        assert seen[1][-1][1] == seen[1][-1][2]

    def test_a_tokenizer_that_cannot_be_loaded(self, model_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match="damaged"):
            make_llm(model_dir, tokenizer=tmp_path, num_replicas=1)

    def test_a_start_that_takes_too_long(self, model_dir: Path) -> None:
        config = WorkerConfig(start_timeout=0.2)
        with pytest.raises(WorkerStartError, match=r"worker-0 was not ready within 0\.2 s"):
            make_llm(model_dir, num_replicas=1, worker_config=config)

    def test_a_worker_that_ends_at_once(
        self, model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(WorkerStartError, match="ended with exit code 1 while it started"):
            make_llm(model_dir, num_replicas=1)
        monkeypatch.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(TokenmillError, match="cannot be started"):
            make_llm(model_dir, num_replicas=1)

    def test_postprocessing_workers_need_replicas(self, model_dir: Path) -> None:
        with pytest.raises(InvalidParameterError) as caught:
            make_llm(model_dir, num_postprocess_workers=1)
        assert caught.value.field == "num_postprocess_workers"

    def test_logs_are_kept_where_the_user_wants_them(self, model_dir: Path, tmp_path: Path) -> None:
        config = WorkerConfig(log_dir=tmp_path / "logs")
        with make_llm(model_dir, num_replicas=1, worker_config=config) as llm:
            (process,) = llm.health().processes
            assert process.pid is not None
            os.kill(process.pid, signal.SIGUSR1)
            log = tmp_path / "logs" / f"worker-0-{os.getpid()}.log"
            wait_until(lambda: "Current thread" in log.read_text() or "Thread 0x" in log.read_text())
            assert llm.generate("rain").finished, "showing stacks does not harm"


# Not under `if __name__ == "__main__"`: a worker must not run the user's script again.
# The first call undoes what a shell does to a job in the background: it lets it ignore Ctrl-C, and all that it starts.
SCRIPT = """
    import json, os, signal, sys, threading, time
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from tokenmill import LLM, KvCacheConfig, SamplingParams
    from tokenmill.config import WorkerConfig
    llm = LLM({model!r}, dtype="float32", device="cpu", num_threads=1, num_replicas=1, num_postprocess_workers=1,
              kv_cache_config=KvCacheConfig(max_tokens=17_000))
    assert "torch" not in sys.modules
    params = SamplingParams(max_tokens=16_000, ignore_eos=True, bad_token_ids=[319])
    result = llm.generate_async("rain", params, streaming=True)
    next(result)
    folder = str(llm._executor._folder.path)
    pids = [process.pid for process in llm.health().processes]
    print(json.dumps({{"pids": pids, "folder": folder}}), flush=True)
"""


@contextmanager
def running_script(model_dir: Path, ending: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A user's script that has begun to generate, and what it says of its workers. Ends with the block."""
    code = textwrap.dedent(SCRIPT).format(model=str(model_dir)) + textwrap.dedent(ending)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            facts = json.loads(process.stdout.readline())
            assert len(facts["pids"]) == 2
            yield process, facts
        finally:
            process.kill()


def test_no_worker_outlives_a_killed_parent(model_dir: Path) -> None:
    with running_script(model_dir, "time.sleep(1000)") as (process, facts):
        os.kill(facts["pids"][0], signal.SIGSTOP)  # not even a stopped one
        process.kill()
        process.wait()
        wait_until(lambda: not any(is_alive(pid) for pid in facts["pids"]), 10.0)
    assert Path(facts["folder"]).exists(), "nobody was left to remove it"
    for path in Path(facts["folder"]).iterdir():
        path.unlink()
    Path(facts["folder"]).rmdir()


def test_ctrl_c_ends_everything(model_dir: Path) -> None:
    with running_script(model_dir, "time.sleep(1000)") as (process, facts):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: parent and workers get it
        assert process.wait(20.0) != 0
        assert not any(is_alive(pid) for pid in facts["pids"])
        assert not Path(facts["folder"]).exists()


IN_PROCESS = """
    import signal, time
    from llvmlite.binding.ffi import lib
    from tokenmill import LLM, KvCacheConfig, SamplingParams
    from tokenmill.runtime import cpu_program
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def say_and_sleep(*arguments):
        with lib._lock:
            print("now", flush=True)
            time.sleep(1000)

    def start():
        cache = KvCacheConfig(max_tokens=17_000)
        return LLM({model!r}, dtype="float32", device="cpu", num_threads=3, kv_cache_config=cache)

"""
MOMENTS = {
    "kernels are compiled": """
        cpu_program.compile_all = say_and_sleep
        start()
    """,
    "the caller waits for something else": """
        params = SamplingParams(max_tokens=16_000, ignore_eos=True, bad_token_ids=[319])
        results = [start().generate_async("rain", params, streaming=True)]
        next(results[0])
        say_and_sleep()
    """,
    "tokens are awaited": """
        llm = start()
        print("now", flush=True)
        llm.generate("rain", SamplingParams(max_tokens=16_000, ignore_eos=True, bad_token_ids=[319]))
    """,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_ends_a_script_while(model_dir: Path, moment: str) -> None:
    code = textwrap.dedent(IN_PROCESS).format(model=str(model_dir)) + textwrap.dedent(MOMENTS[moment])
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "now\n"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=10.0)
        finally:
            process.kill()
    assert process.returncode in (1, -signal.SIGINT)
    assert errors.count("Traceback") == 1, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize(
    ("before", "last_act"),
    [("pass", "pass"), ("result.abort(); list(result)", "del llm, result")],
    ids=["exits", "drops its copy"],
)
def test_a_fork_of_the_caller_ends_nothing(model_dir: Path, before: str, last_act: str) -> None:
    ending = f"""
        {before}
        if os.fork() == 0:
            {last_act}
            sys.exit()  # runs what is registered for the end of the process
        os.wait()
        time.sleep(0.2)
        print(llm.generate("rain", SamplingParams(max_tokens=3, detokenize=False)).finished, flush=True)
    """
    with running_script(model_dir, ending) as (process, facts):
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert process.wait(20.0) == 0
        assert not Path(facts["folder"]).exists()


def test_a_script_that_just_ends_leaves_nothing(model_dir: Path) -> None:
    with running_script(model_dir, "") as (process, facts):
        assert process.wait(20.0) == 0
        assert not any(is_alive(pid) for pid in facts["pids"])
        assert not Path(facts["folder"]).exists()
