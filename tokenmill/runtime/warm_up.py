"""`run_together`: first runs of steps, beside each other, in which their kernels are compiled. Called when an engine
starts on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from tokenmill.ops.compile_once import compile_once

MAX_THREADS = 16


def run_together(steps: Sequence[Callable[[], object]], device: torch.device) -> None:
    """Run `steps` on threads: what takes long in a first run is the compiler of its kernels, most of which runs
    outside Python's lock. A kernel that several steps need is compiled by one of them.

    All threads launch into the default stream, so that steps share tensors as if they ran one after the other.
    """

    def run(step: Callable[[], object]) -> None:
        torch.cuda.set_device(device)
        with torch.inference_mode():  # a property of the thread
            step()

    num_threads = max(1, min(len(steps), MAX_THREADS))
    with compile_once(), ThreadPoolExecutor(num_threads, thread_name_prefix="tokenmill-warm-up") as pool:
        for done in [pool.submit(run, step) for step in steps]:
            done.result()
    torch.cuda.synchronize(device)
