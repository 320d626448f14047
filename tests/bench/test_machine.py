"""The description of this machine agrees with what Python says of it."""

from __future__ import annotations

import os
import platform

import torch

from tokenmill.bench.machine import Machine, describe_machine, describe_versions
from tokenmill.version import __version__


def test_this_machine() -> None:
    machine = describe_machine()
    assert machine.cpu
    assert 1 <= machine.num_cores <= (os.cpu_count() or 1)
    assert machine.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert len(machine.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert platform.system() in machine.system


def test_versions() -> None:
    assert describe_versions() == {
        "tokenmill": __version__, "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


def test_summary_is_one_line() -> None:
    machine = Machine(system="Linux", cpu="A CPU", num_cores=8, memory_bytes=64 * 2**30, gpus=("A GPU", "A GPU"))
    assert machine.summary == "A GPU · A GPU · A CPU, 8 cores · 64 GiB"
