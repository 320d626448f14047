"""Compilation of the native functions of `ops/cpu/`: lazy, once per machine, kept in a disk cache.

Numba would put its cache beside the sources and would not notice when a helper in another file changed. Here the cache
lies in tokenmill's cache folder, under a name made of all sources of `ops/cpu/` and the versions of the compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

import llvmlite
import numba
from numba.core import types
from numba.core.compiler_lock import global_compiler_lock

from tokenmill.env import read_environment

logger = logging.getLogger(__name__)

KERNEL_SIGNATURE: Final = types.void(types.int64, types.int64, types.int64)

device: Final = numba.njit(nogil=True, boundscheck=False, error_model="numpy")
"""Decorator of helpers that kernels call. They are compiled with the kernels, and inlined when LLVM likes it."""


@cache
def source_digest() -> str:
    """Names all sources of this folder and the compiler: what a cached function depends on, except the CPU."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path | None:
    """Where compiled functions are kept; None if nothing can be written there."""
    folder = read_environment().cache_dir / "native" / source_digest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


class NativeFunction:
    """A Python function compiled to a C function.

    Args:
        function: of int64 arguments, in the subset of Python that Numba compiles without Python objects.
        signature: Numba's.
    """

    def __init__(self, function: Callable[..., Any], signature: Any = KERNEL_SIGNATURE) -> None:
        self.function = function
        self.name = function.__qualname__
        self.signature = signature

    @cached_property
    def compiled(self) -> Any:
        """Numba's C callback; compiled or read from the disk cache at the first use."""
        with global_compiler_lock:
            return self._compile()

    @property
    def address(self) -> int:
        """Address of the C function. It stays valid as long as this object lives."""
        return int(self.compiled.address)

    @cached_property
    def call(self) -> Callable[..., Any]:
        """The function for Python callers; releases the interpreter lock while it runs."""
        function: Callable[..., Any] = self.compiled.ctypes
        return function

    def _compile(self) -> Any:
        options = {"boundscheck": False, "error_model": "numpy"}
        has_file = Path(self.function.__code__.co_filename).is_file()  # Numba stamps what it keeps with the file's time
        folder = cache_folder() if has_file else None
        if folder is None:
            logger.warning("No cache folder or no source file: %s is compiled again in every process", self.name)
            return numba.cfunc(self.signature, **options)(self.function)
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(folder)
        try:
            return numba.cfunc(self.signature, cache=True, **options)(self.function)
        finally:
            numba.config.CACHE_DIR = before


def kernel(function: Callable[[int, int, int], None]) -> NativeFunction:
    """Decorator: `(thread, num_threads, row)` becomes a kernel of the op list, see `tokenmill.ops.cpu`."""
    return NativeFunction(function)


def float_bits(value: float) -> int:
    """A float argument of an op row: the bits of the float64."""
    return ctypes.c_int64.from_buffer_copy(ctypes.c_double(value)).value
