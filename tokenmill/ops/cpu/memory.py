"""Memory for weights: aligned, and in huge pages where the system gives them. Used by the CPU executor."""

from __future__ import annotations

import mmap
from typing import Final

import numpy as np
import numpy.typing as npt

HUGE_PAGE: Final = 2 << 20
"""Bytes. Reading weights from pages of this size is up to twice as fast as from pages of 4 KiB."""

MADV_HUGEPAGE: Final = getattr(mmap, "MADV_HUGEPAGE", None)


def huge_page_memory(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed memory at a multiple of 2 MiB, in huge pages if the system has them; freed with the array.

    Args:
        num_bytes: at least 1.
    """
    size = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
    # Shared mappings, mmap's default, get no huge pages.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    mapping = mmap.mmap(-1, size + HUGE_PAGE, **private)
    memory = np.frombuffer(mapping, np.uint8)
    first = -memory.ctypes.data % HUGE_PAGE
    if MADV_HUGEPAGE is not None:
        try:
            mapping.madvise(MADV_HUGEPAGE, first, size)
        except OSError:  # a kernel without huge pages
            return memory[first : first + num_bytes]
    return memory[first : first + num_bytes]
