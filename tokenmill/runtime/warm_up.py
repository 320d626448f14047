"""`run_together`: first runs of steps, beside each other. The runner calls it before the first plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

NUM_THREADS = 8


def run_together(steps: Sequence[Callable[[], object]], device: torch.device) -> None:
    """Run `steps` on threads: what takes long in a first run is the compiler of its kernels, half of which runs
    outside Python's lock.

    All threads launch into the default stream, so that steps share tensors as if they ran one after the other.
    """

    def run(step: Callable[[], object]) -> None:
        torch.cuda.set_device(device)
        with torch.inference_mode():  # a property of the thread
            step()

    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenmill-warm-up") as pool:
        for done in [pool.submit(run, step) for step in steps]:
            done.result()
    torch.cuda.synchronize(device)
