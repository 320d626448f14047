"""Native functions of `ops/cpu/`: Python functions that are translated to machine code when they are first used.

`native_functions.py` translates them to LLVM code, `machine_code.py` makes machine code of that, and the result is kept
in tokenmill's cache folder, under a name made of all that it depends on. The next process only reads it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from pathlib import Path
from types import FunctionType
from typing import Any, Final, TypeVar, cast

import llvmlite

from tokenmill.env import read_environment
from tokenmill.ops.cpu import machine_code
from tokenmill.ops.cpu.native_functions import write_module
from tokenmill.ops.cpu.native_types import DeviceFunction, Operation, Signature, Type, float32, float64, int64, none

logger = logging.getLogger(__name__)

KERNEL_SIGNATURE: Final = none(int64, int64, int64)

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def device(function: FunctionT) -> FunctionT:
    """Decorator of helpers that native functions call. They are compiled with these, and inlined when LLVM likes it."""
    assert isinstance(function, FunctionType)
    return DeviceFunction(function)  # type: ignore[return-value]  # which checks the calls


@cache
def source_digest() -> str:
    """Names all sources of this folder and the compiler: what machine code depends on, except the processor."""
    digest = hashlib.sha256(llvmlite.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _file_digest(path: str) -> str:
    file = Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


class NativeFunction:
    """A Python function compiled to a C function.

    Args:
        function: in the part of Python that `native_functions.py` describes.
        signature: of it.
    """

    def __init__(self, function: Callable[..., Any], signature: Signature = KERNEL_SIGNATURE) -> None:
        assert isinstance(function, FunctionType)
        self.function = function
        self.name = function.__qualname__
        self.signature = signature
        self._lock = threading.Lock()
        self._loaded: machine_code.Loaded | None = None

    @cached_property
    def key(self) -> str:
        """Names the machine code: everything that it depends on but the processor and the sources of this folder."""
        code = self.function.__code__
        constants = [_text_of(cell.cell_contents) for cell in self.function.__closure__ or ()]
        text = f"{self.signature} {self.name} {code.co_firstlineno} {constants}"
        if Path(code.co_filename).parent != Path(__file__).parent:
            text += _file_digest(code.co_filename)
        name = "".join(letter if letter.isalnum() or letter == "_" else "-" for letter in code.co_name)
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def address(self) -> int:
        """Address of the C function; compiled or read from the disk cache at the first use. It stays valid as long as
        this object lives."""
        with self._lock:
            if self._loaded is None and not self._read():
                self._keep(machine_code.compile_module(self.llvm_code(), machine_code.host_processor()))
            assert self._loaded is not None
            return self._loaded.address

    @cached_property
    def call(self) -> Callable[..., Any]:
        """The function for Python callers; releases the interpreter lock while it runs."""
        result, parameters = _C_TYPES[self.signature.result], [_C_TYPES[kind] for kind in self.signature.parameters]
        function: Any = ctypes.CFUNCTYPE(result, *parameters)(self.address)
        function.owner = self  # or the machine code would be freed under a caller who has nothing but this
        return cast(Callable[..., Any], function)

    def read(self) -> bool:
        """Read the machine code from the disk cache, unless it is here; whether it is here now."""
        with self._lock:
            return self._loaded is not None or self._read()

    def keep(self, code: bytes) -> None:
        """Use an object file that was made of `llvm_code`, and write it to the disk cache."""
        with self._lock:
            self._keep(code)

    def llvm_code(self) -> str:
        """The function in LLVM's notation.

        Raises:
            NativeSyntaxError: it contains what cannot be translated.
        """
        return str(write_module(self.function, self.signature, self.key))

    def _read(self) -> bool:
        code = machine_code.read_code(_code_folder() / self.key)
        if code is None:
            return False
        self._loaded = machine_code.load(code, self.key, machine_code.host_processor())
        return True

    def _keep(self, code: bytes) -> None:
        self._loaded = machine_code.load(code, self.key, machine_code.host_processor())
        if not machine_code.write_code(_code_folder() / self.key, code):
            logger.warning(
                "Nothing can be written to %s: %s is compiled again in every process", _code_folder(), self.name
            )


def _text_of(constant: Any) -> str:
    """Names what a function takes from its closure."""
    if isinstance(constant, Operation):
        return constant.name
    return constant.function.__qualname__ if isinstance(constant, DeviceFunction) else repr(constant)


def _code_folder() -> Path:
    """Where machine code for this processor is kept."""
    processor = machine_code.host_processor()
    name = hashlib.sha256(f"{processor.name} {processor.features}".encode()).hexdigest()[:16]
    return read_environment().cache_dir / "native" / source_digest() / name


_C_TYPES: Final[Mapping[Type, Any]] = {
    none: None,
    int64: ctypes.c_int64,
    float32: ctypes.c_float,
    float64: ctypes.c_double,
}


def kernel(function: Callable[[int, int, int], None]) -> NativeFunction:
    """Decorator: `(thread, num_threads, row)` becomes a kernel of the op list, see `tokenmill.ops.cpu`."""
    return NativeFunction(function)


def float_bits(value: float) -> int:
    """A float argument of an op row: the bits of the float64."""
    return ctypes.c_int64.from_buffer_copy(ctypes.c_double(value)).value
