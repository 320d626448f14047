"""What this machine's processor can do, as far as engines depend on it. Read when an engine is built and loaded.

An instruction set is a name for the processor features that packed weights and their kernels need; the best one that
the processor has is used.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec

_CPUINFO: Final = Path("/proc/cpuinfo")

INSTRUCTION_SETS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "avx512_vnni": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"),
        "avx2": ("avx2", "fma", "f16c"),
        "portable": (),
    }
)
"""Features that each instruction set needs, under their names in /proc/cpuinfo; the best one first."""


class Processor(msgspec.Struct, frozen=True, kw_only=True):
    """A processor.

    Args:
        architecture: such as `x86_64` or `aarch64`.
        model: its name, for people and as a key of timings.
        features: names of what it can do, as in /proc/cpuinfo; empty where they cannot be read.
    """

    architecture: str
    model: str
    features: frozenset[str] = frozenset()

    @property
    def instruction_sets(self) -> tuple[str, ...]:
        """Those it has, the best one first; `portable` is always there."""
        return tuple(name for name, needed in INSTRUCTION_SETS.items() if self.features.issuperset(needed))


def read_processor(cpuinfo: Path = _CPUINFO) -> Processor:
    """This machine's processor; without /proc/cpuinfo nothing but its architecture is known."""
    architecture = platform.machine() or "unknown"
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0].splitlines()
    except OSError:
        return Processor(architecture=architecture, model=platform.processor() or architecture)
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    model = values.get("model name") or architecture
    if "model" in values:
        model += f" (family {values.get('cpu family')}, model {values['model']}, stepping {values.get('stepping')})"
    features = frozenset((values.get("flags") or values.get("Features") or "").split())
    return Processor(architecture=architecture, model=model, features=features)
