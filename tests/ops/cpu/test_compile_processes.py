"""Many functions are compiled at once, in processes; whatever happens to these, the functions are there."""

from __future__ import annotations

import io
import logging
import subprocess
from pathlib import Path

import pytest

from tokenmill.ops.cpu import compile_processes, machine_code
from tokenmill.ops.cpu.compile_processes import compile_all
from tokenmill.ops.cpu.jit import NativeFunction
from tokenmill.ops.cpu.native_types import int64

pytestmark = pytest.mark.spec("H1")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    return tmp_path


def times(factor: int) -> NativeFunction:
    def product(x: int) -> int:
        return factor * x

    return NativeFunction(product, int64(int64))


def check(functions: list[NativeFunction]) -> None:
    assert [function.call(7) for function in functions] == [7 * factor for factor in range(len(functions))]


@pytest.mark.parametrize("num_processes", [1, 2, 9])
def test_progress(num_processes: int, caplog: pytest.LogCaptureFixture) -> None:
    functions = [times(factor) for factor in range(5)]
    told: list[tuple[int, int]] = []
    with caplog.at_level(logging.INFO):
        compile_all([*functions, *functions], num_processes, lambda *progress: told.append(progress))
    assert told == [(done, 5) for done in range(6)]
    assert "Compiling 5 kernels, once on this machine." in caplog.text
    check(functions)


def test_what_was_compiled_before_is_read() -> None:
    compile_all([times(factor) for factor in range(4)], 2)
    told: list[tuple[int, int]] = []
    again = [times(factor) for factor in range(6)]
    compile_all(again, 2, lambda *progress: told.append(progress))
    assert told == [(0, 2), (1, 2), (2, 2)]
    check(again)
    compile_all(again, 2, lambda *progress: pytest.fail("there is nothing to do"))


def test_processes_that_die(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = compile_processes._start

    def start_and_kill(processor: machine_code.Processor) -> subprocess.Popen[bytes] | None:
        process = start(processor)
        assert process is not None
        process.kill()
        started.append(process)
        return process

    monkeypatch.setattr(compile_processes, "_start", start_and_kill)
    functions = [times(factor) for factor in range(4)]
    compile_all(functions, 2)
    check(functions)
    assert len(started) == 2


def test_a_system_without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_processes.sys, "executable", "/nowhere/python")
    functions = [times(factor) for factor in range(4)]
    compile_all(functions, 2)
    check(functions)


def test_an_interruption_ends_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = compile_processes._start

    def start_and_note(processor: machine_code.Processor) -> subprocess.Popen[bytes] | None:
        process = start(processor)
        assert process is not None
        started.append(process)
        return process

    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(compile_processes, "_start", start_and_note)
    with pytest.raises(KeyboardInterrupt):
        compile_all([times(factor) for factor in range(4)], 2, interrupt)
    assert [process.poll() is not None for process in started] == [True, True]


def test_messages() -> None:
    stream = io.BytesIO()
    for content in (b"", b"one", bytes(1000)):
        machine_code.send(stream, content)
    whole = stream.getvalue()
    stream.seek(0)
    assert [machine_code.receive(stream) for _ in range(4)] == [b"", b"one", bytes(1000), None]
    assert machine_code.receive(io.BytesIO(whole[:3])) is None
    assert machine_code.receive(io.BytesIO(whole[8:14])) is None


def test_a_module_that_is_wrong_has_an_empty_answer() -> None:
    requests, answers = io.BytesIO(), io.BytesIO()
    machine_code.send(requests, b"this is no module")
    machine_code.send(requests, times(3).llvm_code().encode())
    requests.seek(0)
    machine_code.serve(requests, answers, machine_code.host_processor())
    answers.seek(0)
    assert machine_code.receive(answers) == b""
    code = machine_code.receive(answers)
    function = times(3)
    assert code
    function.keep(code)
    assert function.call(5) == 15


def test_an_object_file_without_the_function_is_refused() -> None:
    processor = machine_code.host_processor()
    code = machine_code.compile_module(times(3).llvm_code(), processor)
    with pytest.raises(RuntimeError, match="has no function other"):
        machine_code.load(code, "other", processor)
