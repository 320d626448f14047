"""Weights that come to L2 before a kernel may read what it multiplies them with: Hopper and later.

A program that was started early (`launch.py`) waits while the memory has little to do. Called by kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch_and_pause(start: tl.tensor, num_bytes: tl.tensor, pause: tl.constexpr) -> None:
    """Ask for `num_bytes` from `start` on, both multiples of 16, less than 1 MiB: one thread does. All rest then.

    Args:
        start: of any type.
        num_bytes: int32.
        pause: nanoseconds, roughly.
    """
    tl.inline_asm_elementwise(
        """{
            .reg .pred is_first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 is_first, thread, 0;
            @is_first cp.async.bulk.prefetch.L2.global [$1], $2;
            nanosleep.u32 $3;
            mov.u32 $0, 0;
        }""",
        "=r,l,r,r",
        [start, num_bytes, tl.full([], pause, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
