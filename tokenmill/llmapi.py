"""The names that users of TensorRT-LLM's `tensorrt_llm.llmapi` import, in one place."""

from tokenmill.config import BuildConfig, CapacitySchedulerPolicy, KvCacheConfig, LlmArgs, SchedulerConfig
from tokenmill.errors import TokenmillError as RequestError
from tokenmill.llm import LLM
from tokenmill.outputs import CompletionOutput, RequestOutput
from tokenmill.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "BuildConfig",
    "CapacitySchedulerPolicy",
    "CompletionOutput",
    "KvCacheConfig",
    "LlmArgs",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
]
