"""`machine_key`: the name under which times that were measured on this machine are kept."""

from __future__ import annotations

import hashlib

from tokenmill.ops.cpu.cpu_features import cpu_name, host_features
from tokenmill.ops.cpu.jit import source_digest


def machine_key(num_threads: int) -> str:
    """Everything that measured times depend on besides shapes: processor, kernels, compiler, threads."""
    features = hashlib.sha256(" ".join(sorted(host_features())).encode()).hexdigest()[:8]
    return f"{cpu_name()} {features}, kernels {source_digest()}, {num_threads} threads"
