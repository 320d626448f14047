"""Which instructions of this CPU the integer dot product uses. Called by the linear kernels and by engine packages."""

from __future__ import annotations

import platform
from collections.abc import Set
from enum import IntEnum
from functools import cache

import llvmlite.binding


class DotProduct(IntEnum):
    """Ways to compute sums of products of unsigned and signed bytes. All give the same integers."""

    PORTABLE = 0
    """Multiplications of 32-bit lanes, in whatever vectors the CPU has."""
    AVX2 = 1
    """`vpmaddwd` on bytes that are widened in their lanes."""
    AVX_VNNI = 2
    """`vpdpbusd` on 256 bits."""
    AVX512_VNNI = 3
    """`vpdpbusd` on 512 bits."""


REQUIRED_FEATURES = {
    DotProduct.AVX512_VNNI: frozenset({"avx512vnni", "avx512bw", "avx512vl", "avx512dq", "fma", "f16c"}),
    DotProduct.AVX_VNNI: frozenset({"avxvnni", "avx2", "fma", "f16c"}),
    DotProduct.AVX2: frozenset({"avx2", "fma", "f16c"}),
    DotProduct.PORTABLE: frozenset[str](),
}
"""LLVM's names of the instruction sets that each needs."""


@cache
def host_features() -> frozenset[str]:
    """LLVM's names of the instruction sets of this CPU."""
    return frozenset(name for name, present in llvmlite.binding.get_host_cpu_features().items() if present)


def converts_half() -> bool:
    """Whether this CPU has an instruction from float16 to float32; x86 has since F16C."""
    return platform.machine().lower() not in ("x86_64", "amd64") or "f16c" in host_features()


def supported_dot_products(features: Set[str] | None = None) -> tuple[DotProduct, ...]:
    """The ways that a CPU with these features (default: this one) can compute, best first."""
    present = host_features() if features is None else features
    return tuple(way for way in sorted(REQUIRED_FEATURES, reverse=True) if present >= REQUIRED_FEATURES[way])


def best_dot_product() -> DotProduct:
    """The fastest way on this CPU."""
    return supported_dot_products()[0]


def cpu_name() -> str:
    """Architecture and LLVM's name of this CPU, such as `x86_64 znver4`; part of the key of timings."""
    return f"{platform.machine()} {llvmlite.binding.get_host_cpu_name()}"
