"""A pytest plugin: tokenmill takes this machine for one of 2013, with AVX2 and nothing newer.

For x86 machines. Run with `-p tests.support.avx2_processor`.
"""

from __future__ import annotations

import llvmlite.binding

HASWELL = ("avx", "avx2", "bmi", "bmi2", "cx16", "f16c", "fma", "lzcnt", "movbe", "popcnt", "sse4.1", "sse4.2", "ssse3")


class Features(dict[str, bool]):
    """As llvmlite gives them."""

    def flatten(self, sort: bool = True) -> str:
        """In LLVM's notation."""
        return ",".join(f"+{name}" for name in self)


def features() -> Features:
    """All that the processor has."""
    return Features(dict.fromkeys(HASWELL, True))


def pytest_configure() -> None:
    """Nothing of tokenmill has been imported yet."""
    llvmlite.binding.get_host_cpu_features = features
    llvmlite.binding.get_host_cpu_name = lambda: "haswell"
