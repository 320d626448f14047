"""From callers to engines: `GenerationExecutor` takes requests, `GenerationResult` gives their tokens back.

The names in `__all__` are the low-level interface: `Executor` and its types. They are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenmill.config import CapacitySchedulerPolicy, KvCacheConfig, SchedulerConfig
    from tokenmill.executor.low_level.executor import Executor
    from tokenmill.executor.low_level.executor_config import BatchingType, ExecutorConfig, ModelType
    from tokenmill.executor.low_level.request import OutputConfig, Request, SamplingConfig
    from tokenmill.executor.low_level.response import FinishReason, Response, Result
    from tokenmill.executor.low_level.statistics import IterationStats, RequestStats, RequestStatsPerIteration

__all__ = [
    "BatchingType",
    "CapacitySchedulerPolicy",
    "Executor",
    "ExecutorConfig",
    "FinishReason",
    "IterationStats",
    "KvCacheConfig",
    "ModelType",
    "OutputConfig",
    "Request",
    "RequestStats",
    "RequestStatsPerIteration",
    "Response",
    "Result",
    "SamplingConfig",
    "SchedulerConfig",
]

_HOME = {
    "BatchingType": "tokenmill.executor.low_level.executor_config",
    "CapacitySchedulerPolicy": "tokenmill.config",
    "Executor": "tokenmill.executor.low_level.executor",
    "ExecutorConfig": "tokenmill.executor.low_level.executor_config",
    "FinishReason": "tokenmill.executor.low_level.response",
    "IterationStats": "tokenmill.executor.low_level.statistics",
    "KvCacheConfig": "tokenmill.config",
    "ModelType": "tokenmill.executor.low_level.executor_config",
    "OutputConfig": "tokenmill.executor.low_level.request",
    "Request": "tokenmill.executor.low_level.request",
    "RequestStats": "tokenmill.executor.low_level.statistics",
    "RequestStatsPerIteration": "tokenmill.executor.low_level.statistics",
    "Response": "tokenmill.executor.low_level.response",
    "Result": "tokenmill.executor.low_level.response",
    "SamplingConfig": "tokenmill.executor.low_level.request",
    "SchedulerConfig": "tokenmill.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tokenmill.executor' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
