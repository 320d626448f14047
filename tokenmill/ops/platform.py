"""Facts about a device that decide between implementations. The only place (with `attention/select.py`) that asks."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def is_cuda(device: torch.device) -> bool:
    """Whether steps can be captured on the device, and what they take of its memory be measured."""
    return device.type == "cuda"


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 arithmetic of its own."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; cores of a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return os.cpu_count() or 1


def num_usable_cores() -> int:
    """Cores of the CPU that this process may use at the same time: by its affinity, and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, -(-int(quota) // int(period))))


def is_hopper_or_newer(device: torch.device) -> bool:
    """Whether the device copies whole tiles by itself, and starts a kernel while the one before it still runs."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def is_hopper(device: torch.device) -> bool:
    """Whether the device multiplies by groups of four warps, which no later one does."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def free_memory(device: torch.device) -> int:
    """Free memory of the device in bytes; for a CPU what the kernel could give without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    if not Path("/proc/meminfo").exists():  # macOS tells the total only; assume that half of it is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return min(int(available.split()[1]) * 1024, _cgroup_free())


def _cgroup_free() -> int:
    """What the container may still take (cgroup v2); without a limit, more than any machine has."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except OSError:
        return 2**63
    return 2**63 if limit == "max" else max(int(limit) - used, 0)
