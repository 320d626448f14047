"""tokenmill compiles and serves large language models. The public API is what `__all__` lists.

Names are loaded when they are first used, so that `import tokenmill` and `tokenmill --help` are quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenmill.version import __version__

if TYPE_CHECKING:
    from tokenmill.builder.build import build
    from tokenmill.builder.engine import Engine
    from tokenmill.config import BuildConfig, KvCacheConfig, SchedulerConfig, WorkerConfig
    from tokenmill.llm import LLM
    from tokenmill.outputs import CompletionOutput, RequestOutput
    from tokenmill.runtime.session import Session
    from tokenmill.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "BuildConfig",
    "CompletionOutput",
    "Engine",
    "KvCacheConfig",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
    "Session",
    "WorkerConfig",
    "__version__",
    "build",
]

_HOME = {
    "LLM": "tokenmill.llm",
    "BuildConfig": "tokenmill.config",
    "CompletionOutput": "tokenmill.outputs",
    "Engine": "tokenmill.builder.engine",
    "KvCacheConfig": "tokenmill.config",
    "RequestOutput": "tokenmill.outputs",
    "SamplingParams": "tokenmill.sampling_params",
    "SchedulerConfig": "tokenmill.config",
    "Session": "tokenmill.runtime.session",
    "WorkerConfig": "tokenmill.config",
    "build": "tokenmill.builder.build",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tokenmill' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
