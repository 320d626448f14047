"""`ExecutorConfig`: how a low-level executor runs its model. Names and defaults follow TensorRT-LLM's."""

from __future__ import annotations

from enum import Enum, StrEnum
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from tokenmill.config import CapacitySchedulerPolicy, KvCacheConfig, LlmArgs, SchedulerConfig, StatsConfig
from tokenmill.errors import InvalidParameterError, UnsupportedFeatureError
from tokenmill.executor.low_level.checks import CompatibleModel


class ModelType(Enum):
    """What kind of model an executor runs."""

    DECODER_ONLY = 0
    ENCODER_ONLY = 1
    ENCODER_DECODER = 2


class BatchingType(StrEnum):
    """When requests join those that run."""

    STATIC = "STATIC"
    """A batch runs to its end before the next begins."""
    INFLIGHT = "INFLIGHT"
    """At any step."""


class ExecutorConfig(CompatibleModel):
    """How a model is run. Requests are checked against these limits when they are enqueued.

    Raises:
        InvalidParameterError: a value is out of range, or contradicts another.
        UnknownParameterError: no such parameter, with did-you-mean.
        UnsupportedFeatureError: beam search, or another parameter that this version cannot honour.
    """

    max_beam_width: int = Field(default=1, ge=1)
    """Widest beam search; this version supports 1."""
    scheduler_config: SchedulerConfig = Field(default_factory=SchedulerConfig)
    """Admission and order of requests."""
    kv_cache_config: KvCacheConfig = Field(default_factory=KvCacheConfig)
    """The paged cache."""
    enable_chunked_context: bool = True
    """Split long prompts over steps and mix them with running answers."""
    normalize_log_probs: bool = False
    """`Result.cum_log_probs` is divided by the number of generated tokens."""
    iter_stats_max_iterations: int = Field(default=1000, ge=0, le=1_000_000)
    """Steps that `get_latest_iteration_stats` can look back."""
    request_stats_max_iterations: int = Field(default=0, ge=0, le=1_000_000)
    """Steps that `get_latest_request_stats` can look back; 0: none are kept, which saves time in each step."""
    batching_type: BatchingType = BatchingType.INFLIGHT
    """`STATIC` sets the capacity policy STATIC_BATCH; `INFLIGHT` leaves it to `scheduler_config`."""
    max_batch_size: int = Field(default=64, ge=1)
    """Most sequences that run at the same time."""
    max_num_tokens: int | None = Field(default=None, ge=1)
    """Most tokens computed in one step, over all sequences; None: as in `LlmArgs`."""
    max_queue_size: int = Field(default=4096, ge=1)
    """Most requests that may wait; one more is refused with `QueueFullError`."""
    max_seq_len: int | None = Field(default=None, ge=2)
    """Longest prompt plus answer, in tokens; None: the model's context."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; auto: the first GPU, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; auto: bfloat16 where the device computes in it, else float32."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads for tensor work; None: torch's default."""

    not_yet: ClassVar[frozenset[str]] = frozenset({
        "parallel_config", "peft_cache_config", "logits_post_processor_config", "decoding_config",
        "speculative_decoding_config", "spec_dec_config", "guided_decoding_config", "additional_model_outputs",
        "cache_transceiver_config", "gather_generation_logits", "prompt_table_offloading", "enable_trt_overlap",
        "use_gpu_direct_storage", "use_variable_beam_width_search", "extended_runtime_perf_knob_config",
        "debug_config", "max_seq_idle_microseconds", "recv_poll_period_ms", "mm_embedding_offloading",
        "fail_fast_on_attention_window_too_large",
    })  # fmt: skip

    @model_validator(mode="after")
    def _check_together(self) -> ExecutorConfig:
        if self.max_beam_width > 1:
            raise UnsupportedFeatureError(
                f"ExecutorConfig.max_beam_width={self.max_beam_width}: this version has no beam search.",
                field="max_beam_width",
                remedy="Set it to 1.",
            )
        policy = self.scheduler_config.capacity_scheduler_policy
        contradicts = policy is CapacitySchedulerPolicy.MAX_UTILIZATION
        if self.batching_type is BatchingType.STATIC and contradicts:
            raise InvalidParameterError(
                f"batching_type=STATIC contradicts the capacity_scheduler_policy {policy}.",
                field="batching_type",
                remedy="Leave one of the two out.",
            )
        return self

    def to_llm_args(self, model: Path) -> LlmArgs:
        """The arguments of a `GenerationExecutor` that runs the model at a local path."""
        scheduler_config = self.scheduler_config
        if self.batching_type is BatchingType.STATIC:
            scheduler_config = scheduler_config.model_copy(
                update={"capacity_scheduler_policy": CapacitySchedulerPolicy.STATIC_BATCH}
            )
        return LlmArgs(
            model=model,
            skip_tokenizer_init=True,
            dtype=self.dtype,
            device=self.device,
            max_batch_size=self.max_batch_size,
            max_num_tokens=self.max_num_tokens,
            max_seq_len=self.max_seq_len,
            enable_chunked_prefill=self.enable_chunked_context,
            kv_cache_config=self.kv_cache_config,
            scheduler_config=scheduler_config,
            stats_config=StatsConfig(
                iter_stats_max_iterations=self.iter_stats_max_iterations,
                request_stats_max_iterations=self.request_stats_max_iterations,
            ),
            max_queue_size=self.max_queue_size,
            num_threads=self.num_threads,
        )
