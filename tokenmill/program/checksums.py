"""Checksums of an engine's files, at the speed of memory: chunks are hashed by several threads at a time."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np

CHUNK_BYTES: Final = 4 << 20
"""The checksum is the SHA-256 of the digests of chunks of this size, so that chunks can be hashed in any order."""

_MAX_THREADS: Final = 8


def checksum(content: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    """`sha256-4m:` and the hexadecimal checksum of `content`, a vector of uint8 of any length."""
    chunks = [content[start : start + CHUNK_BYTES] for start in range(0, content.nbytes, CHUNK_BYTES)]
    num_threads = min(len(chunks), os.cpu_count() or 1, _MAX_THREADS)
    if num_threads <= 1:
        digests = [_digest(chunk) for chunk in chunks]
    else:
        with ThreadPoolExecutor(num_threads, "tokenmill-checksum") as threads:
            digests = list(threads.map(_digest, chunks))
    return "sha256-4m:" + hashlib.sha256(b"".join(digests)).hexdigest()


def _digest(chunk: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    return hashlib.sha256(chunk.data).digest()  # lets other threads run
