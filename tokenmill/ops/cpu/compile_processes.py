"""`compile_all`: machine code for many native functions at once, in several processes. Called before a step is run.

What the disk cache has is read. The rest is translated here, one function after the other, and compiled by processes
that import nothing but LLVM; functions that they do not answer for are compiled here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Final

from tokenmill.ops.cpu import machine_code
from tokenmill.ops.cpu.jit import NativeFunction

logger = logging.getLogger(__name__)

FEWEST: Final = 3
"""Functions from which on processes are worth their start (0.1 s)."""


def compile_all(
    functions: Sequence[NativeFunction], num_processes: int, on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Have the machine code of all functions in memory.

    Args:
        functions: may be here already, or named twice.
        num_processes: that compile.
        on_progress: told how many of the functions that must be compiled are done, and how many there are; not called
            if there are none.
    """
    missing = [function for function in dict.fromkeys(functions) if not function.read()]
    if not missing:
        return
    started = time.monotonic()
    logger.info("Compiling %d kernels, once on this machine.", len(missing))
    tell = on_progress or (lambda done, total: None)
    tell(0, len(missing))
    _compile(missing, num_processes, tell)
    logger.info("Compiled %d kernels in %.1f s.", len(missing), time.monotonic() - started)


def _compile(missing: Sequence[NativeFunction], num_processes: int, tell: Callable[[int, int], None]) -> None:
    if len(missing) < FEWEST or num_processes < 2:
        for done, function in enumerate(missing):
            function.keep(machine_code.compile_module(function.llvm_code(), machine_code.host_processor()))
            tell(done + 1, len(missing))
        return
    with _processes(min(num_processes, len(missing))) as compile_code:
        codes: dict[Future[bytes], NativeFunction] = {}
        with ThreadPoolExecutor(num_processes, thread_name_prefix="tokenmill-compile") as pool:
            for function in missing:
                codes[pool.submit(compile_code, function.llvm_code())] = function
            for done, future in enumerate(as_completed(codes)):
                codes[future].keep(future.result())
                tell(done + 1, len(missing))


@contextlib.contextmanager
def _processes(count: int) -> Iterator[Callable[[str], bytes]]:
    """A function that has one of `count` processes compile a module; any number of threads may call it."""
    processor = machine_code.host_processor()
    started = [process for process in (_start(processor) for _ in range(count)) if process is not None]
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    for process in started:
        idle.put(process)

    def compile_code(text: str) -> bytes:
        if not started:
            return machine_code.compile_module(text, processor)
        process = idle.get()
        try:
            return _ask(process, text) or machine_code.compile_module(text, processor)
        finally:
            idle.put(process)

    try:
        yield compile_code
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _start(processor: machine_code.Processor) -> subprocess.Popen[bytes] | None:
    """A fresh interpreter that finds the same modules as this one; None if the system gives no process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}  # noqa: PTH109
    # -P: without it `-m` would put the working folder first, where a file may be called `queue.py`.
    command = [sys.executable, "-P", "-m", "tokenmill.ops.cpu.machine_code", processor.name, processor.features]
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
    except OSError:
        return None


def _ask(process: subprocess.Popen[bytes], text: str) -> bytes | None:
    """The machine code of a module; None if the process has died or could not compile it."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        machine_code.send(process.stdin, text.encode())
        return machine_code.receive(process.stdout)
    except OSError:
        return None
