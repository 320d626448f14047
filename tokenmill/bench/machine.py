"""What a benchmark ran on: processor, memory, GPUs, and the versions of what was measured."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from tokenmill.version import __version__


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine in words and numbers.

    Args:
        system: operating system and architecture.
        cpu: name of the processor.
        num_cores: processor cores that this process may use (affinity and container quota).
        memory_bytes: main memory.
        gpus: names of the GPUs that torch sees.
    """

    system: str
    cpu: str
    num_cores: int
    memory_bytes: int
    gpus: tuple[str, ...]

    @property
    def summary(self) -> str:
        """One line."""
        parts = [*self.gpus, f"{self.cpu}, {self.num_cores} cores", f"{self.memory_bytes / 2**30:.0f} GiB"]
        return " · ".join(parts)


def describe_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_name(),
        num_cores=_num_cores(),
        memory_bytes=_memory_bytes(),
        gpus=_gpu_names(),
    )


def describe_versions() -> dict[str, str]:
    """Versions of Python, torch and tokenmill."""
    return {"tokenmill": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model", "cpu model") and value.strip():
                return value.strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.stdout.strip():
            return found.stdout.strip()
    return platform.processor() or platform.machine() or "unknown"


def _num_cores() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return usable
    return usable if quota == "max" else max(1, min(usable, math.ceil(int(quota) / int(period))))


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _gpu_names() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
