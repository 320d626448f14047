"""`device_errors`: what a device raises in a step, as errors that the engine can act on. Used by all runners.

No memory left is survived: what the step held is given back, and the engine goes on with `OutOfMemoryError`. After a
fault, such as an illegal access, every later call of the device fails: `DeviceFaultError` ends the engine at once.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tokenmill.errors import DeviceFaultError, OutOfMemoryError

_SHORTAGES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_FAULTS = ("CUDA error", "Triton Error [CUDA]", "CUBLAS_STATUS_EXECUTION_FAILED")


@contextmanager
def device_errors() -> Iterator[None]:
    """Around what a step does on a device.

    Raises:
        OutOfMemoryError: there was no memory left; now there is what the step had taken.
        DeviceFaultError: the device can compute nothing more in this process.
    """
    try:
        yield
    except RuntimeError as error:
        found = _translated(error)
        if found is None:
            raise
        if isinstance(found, OutOfMemoryError):
            _give_back(error)
            raise found from None
        raise found from error


def _translated(error: BaseException) -> OutOfMemoryError | DeviceFaultError | None:
    """What the error means; of one that was raised while another was handled, the first one counts."""
    cause = error.__cause__ or error.__context__
    first = None if cause is None else _translated(cause)
    if isinstance(first, OutOfMemoryError):
        return first
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(part in text for part in _SHORTAGES):
        return OutOfMemoryError(
            f"The device has no memory left for a step: {text.splitlines()[0]}",
            remedy="Lower kv_cache_config.free_gpu_memory_fraction, max_num_tokens or max_batch_size.",
        )
    if isinstance(error, torch.AcceleratorError) or any(part in text for part in _FAULTS):
        return DeviceFaultError(
            f"The device failed: {text.splitlines()[0]}.", remedy="The engine must be started again."
        )
    return first


def _give_back(error: BaseException) -> None:
    """Free what the frames of the failed step hold, and return it to the device."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
