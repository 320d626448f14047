"""From LLVM code to machine code in this process's memory, and the files in which it is kept. Called by `jit.py`.

`python -m tokenmill.ops.cpu.machine_code` is a process that compiles for another one (`compile_processes.py`): LLVM
computes with one thread at a time in a process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Final

import llvmlite.binding as llvm

OPTIMIZATION_LEVEL: Final = 3
"""Of the passes before code is generated. Products with many tokens take 3 % longer with 2, compiling 15 % less."""

_MAGIC: Final = b"tokenmill-code-1\n"
_DIGEST_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Processor:
    """What machine code is made for: LLVM's name, and its features in LLVM's notation."""

    name: str
    features: str


@cache
def host_processor() -> Processor:
    """This machine's."""
    return Processor(llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())


@dataclass(frozen=True, slots=True)
class Loaded:
    """A function in memory.

    Args:
        address: of the C function, as long as this object lives.
        engine: owns the memory.
    """

    address: int
    engine: Any


@cache
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _target_machine(processor: Processor) -> Any:
    _initialize()
    is_x86 = llvm.get_process_triple().partition("-")[0] in ("x86_64", "i386", "i686")
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=processor.name,
        features=processor.features,
        opt=2,
        reloc="static" if is_x86 else "default",
        codemodel="jitdefault",
        jit=True,
    )


def compile_module(text: str, processor: Processor) -> bytes:
    """The object file of a module in LLVM's notation.

    Raises:
        RuntimeError: it is not valid.
    """
    target = _target_machine(processor)
    module = llvm.parse_assembly(text)
    module.triple, module.data_layout = llvm.get_process_triple(), str(target.target_data)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=OPTIMIZATION_LEVEL)
    options.loop_vectorization = options.slp_vectorization = False
    builder = llvm.create_pass_builder(target, options)
    builder.getModulePassManager().run(module, builder)
    code: bytes = target.emit_object(module)
    return code


def load(code: bytes, name: str, processor: Processor) -> Loaded:
    """A function of an object file, ready to be called.

    Raises:
        RuntimeError: the file is none, or has no such function.
    """
    module = llvm.parse_assembly("")
    module.triple = llvm.get_process_triple()
    engine = llvm.create_mcjit_compiler(module, _target_machine(processor))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(name)
    if not address:
        raise RuntimeError(f"The object file has no function {name}.")
    return Loaded(int(address), engine)


# ---- files -----------------------------------------------------------------------------------------------------------


def read_code(path: Path) -> bytes | None:
    """What `write_code` wrote; None if it is not there, or not as it was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    begin = len(_MAGIC) + _DIGEST_BYTES
    if not content.startswith(_MAGIC) or hashlib.sha256(content[begin:]).digest() != content[len(_MAGIC) : begin]:
        return None
    return content[begin:]


def write_code(path: Path, code: bytes) -> bool:
    """Keep an object file: all of it, or nothing. Whether it could be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{id(code)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(_MAGIC + hashlib.sha256(code).digest() + code)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        return False
    return True


# ---- a process that compiles -----------------------------------------------------------------------------------------

_LENGTH: Final = struct.Struct("<q")


def send(stream: IO[bytes], content: bytes) -> None:
    """Write a message to a pipe.

    Raises:
        OSError: nobody reads it.
    """
    stream.write(_LENGTH.pack(len(content)) + content)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes | None:
    """The next message; None at the end, or when it is cut off."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    content = stream.read(length)
    return content if len(content) == length else None


def serve(requests: IO[bytes], answers: IO[bytes], processor: Processor) -> None:
    """Compile modules until there are no more. A module that cannot be compiled has an empty answer."""
    while (text := receive(requests)) is not None:
        try:
            code = compile_module(text.decode(), processor)
        except RuntimeError:
            code = b""
        send(answers, code)


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, Processor(*sys.argv[1:]))
