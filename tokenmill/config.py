"""Configuration that a user passes in: strict, keyword-only, nested by owner.

`LlmArgs` holds all arguments of `LLM`, `BuildConfig` those of a build. `LLM` takes a private copy, so that changing a
configuration afterwards has no effect on a running engine.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, FieldSerializationInfo, field_serializer, field_validator, model_validator

from tokenmill.errors import InvalidParameterError, UnsupportedFeatureError
from tokenmill.strict_model import StrictModel


class CapacitySchedulerPolicy(StrEnum):
    """How requests are admitted when cache blocks are scarce."""

    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    """Admit a request only when its longest possible course fits: nothing running is ever stopped."""
    MAX_UTILIZATION = "MAX_UTILIZATION"
    """Admit as long as there is room now; on shortage preempt the request that came last and resume it later."""
    STATIC_BATCH = "STATIC_BATCH"
    """Admit a batch, run it to its end, admit the next."""


class SchedulerConfig(StrictModel):
    """How the scheduler admits and orders requests."""

    capacity_scheduler_policy: CapacitySchedulerPolicy = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
    """Admission policy for cache blocks."""
    waiting_queue_policy: Literal["fcfs", "priority"] = "fcfs"
    """Order of the waiting queue: by arrival, or by `priority` (higher first) and then arrival."""


class KvCacheConfig(StrictModel):
    """The paged cache of keys and values."""

    enable_block_reuse: bool = True
    """Keep finished prefixes and reuse them for later prompts that start the same."""
    enable_partial_reuse: bool = True
    """Reuse a block of which only the first tokens match, by copying it."""
    tokens_per_block: int = Field(default=32, ge=1, le=1024)
    """Tokens in one block."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Size of the cache in tokens; None: as `free_gpu_memory_fraction` allows (on a CPU: a quarter of free memory)."""
    free_gpu_memory_fraction: float = Field(default=0.9, gt=0.0, lt=1.0)
    """Share of the device memory left after loading weights that the cache may take."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = "auto"
    """Type of cached keys and values; auto: the model's, or what a compiled engine was built with: on a CPU bfloat16
    beside quantized weights. `fp8` (float8_e4m3fn) needs a GPU."""


class StatsConfig(StrictModel):
    """How many records an engine keeps of its last steps; none by default."""

    iter_stats_max_iterations: int = Field(default=0, ge=0, le=1_000_000)
    """Steps of which `EngineStats.recent_steps` has a record."""
    request_stats_max_iterations: int = Field(default=0, ge=0, le=1_000_000)
    """Steps of which `EngineStats.recent_requests` has a record of every request. Costs time in each step."""


class WorkerConfig(StrictModel):
    """How worker processes are started, watched, restarted and ended. Only used with `num_replicas` of 1 or more,
    except `grace_period`. Times are in seconds."""

    start_timeout: float = Field(default=600.0, gt=0.0)
    """Longest time that a worker may take to load its model."""
    stall_timeout: float = Field(default=120.0, gt=0.0)
    """A worker that has work and finishes no step, or says nothing at all, for this long is killed and restarted. Must
    be longer than the longest step."""
    heartbeat_interval: float = Field(default=0.5, gt=0.0, le=10.0)
    """How often a worker reports that it is alive."""
    grace_period: float = Field(default=5.0, ge=0.0)
    """At shutdown running requests may finish for this long; the rest end with `ExecutorShutdownError`."""
    max_attempts: int = Field(default=3, ge=1, le=100)
    """How often a request is tried when workers die under it and nothing of its answer has been handed out. The last
    attempt runs alone, so that a request that kills workers cannot take others with it."""
    max_restarts: int = Field(default=5, ge=0)
    """A worker that dies more often than this within `restart_window` is given up."""
    restart_window: float = Field(default=120.0, gt=0.0)
    """See `max_restarts`."""
    restart_backoff: float = Field(default=0.5, gt=0.0)
    """Wait before the second restart in a row; doubled for each further one. The first is immediate."""
    restart_backoff_cap: float = Field(default=30.0, gt=0.0)
    """Longest wait before a restart."""
    log_dir: Path | None = None
    """Where worker processes write their logs; None: a private folder that is removed at shutdown."""


_BuildQuantization = Literal["auto", "none", "int8", "int8_group32", "int8_channel", "q4_0", "q4_1", "q5_0", "q8_0"]


class BuildConfig(StrictModel):
    """How an engine is built: for `build`, and for `LLM(build_config=...)`, which builds one when it has to.

    Sizes are the largest that it will serve; smaller steps need no other engine.
    """

    max_batch_size: int = Field(default=64, ge=1, le=65_536)
    """Most sequences that run at the same time."""
    max_num_tokens: int = Field(default=2048, ge=1, le=1 << 20)
    """Most tokens computed in one step, over all sequences; memory for intermediate results is planned for it."""
    max_input_len: int | None = Field(default=None, ge=1)
    """Longest prompt in tokens; None: `max_seq_len` less one."""
    max_seq_len: int | None = Field(default=None, ge=2)
    """Longest prompt plus answer, in tokens; None: the model's context."""
    max_beam_width: int = Field(default=1, ge=1)
    """Beams of a sequence. This version has no beam search: more than 1 is refused."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights that are not quantized; auto: bfloat16 if the checkpoint is, else float32. Intermediate results
    are float32 on a CPU."""
    quantization: _BuildQuantization = "auto"
    """Format of linear weights; auto: the checkpoint's own. `int8` is `int8_group32`: a scale for 32 values of a row;
    `int8_channel` has one for a row. The others are ggml's block types; `none` decodes what is quantized."""
    kv_cache_type: Literal["paged", "continuous", "disabled"] = "paged"
    """How keys and values are kept. Engines have a paged cache, which also serves `continuous`, with a notice: one
    piece for each sequence is another place for the same values. Without a cache (`disabled`) nothing is generated."""
    kv_cache_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of cached keys and values; auto: the weights' type on a GPU; on a CPU bfloat16 beside quantized
    weights, else float32."""
    capture: Literal["export", "dispatch"] = "export"
    """How the model's graph is found: `export` (torch.export) proves that it serves every number of tokens, `dispatch`
    gives the same graph within milliseconds."""
    opt_level: int = Field(default=2, ge=0, le=2)
    """0: no passes but those that a program needs; 1: all passes; 2: kernel variants are measured, too."""
    passes: tuple[str, ...] | None = None
    """The passes to run, in this order; None: those of `opt_level` (`tokenmill build --list-passes`)."""
    disabled_passes: tuple[str, ...] = ()
    """Passes to leave out."""
    profiles: tuple[int, ...] = (1, 4, 16, 64, 512)
    """Numbers of tokens in a step for which kernel variants are measured; those over `max_num_tokens` are left out."""
    strip_weights: bool = False
    """Leave out the weights that the checkpoint holds: a small engine, to be refitted before it runs."""
    debug_outputs: tuple[str, ...] = ()
    """Operations whose results are kept after a step, by name (`tokenmill inspect ENGINE` lists them)."""
    picture: bool = True
    """Draw the network before and after the passes into `graph.html` of the engine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What the engine runs on; auto: a GPU if there is one."""
    timing_cache: Path | None = None
    """File of measured kernel variants that is read and added to; None: one in tokenmill's cache folder."""
    num_threads: int | None = Field(default=None, ge=1, le=4096)
    """Threads that kernel variants are measured with; None: one for each core."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    @field_validator("passes", "disabled_passes", "debug_outputs", mode="after")
    @classmethod
    def _check_unique(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and len(set(names)) < len(names):
            raise ValueError("a name appears twice")
        return names

    @field_validator("profiles", mode="after")
    @classmethod
    def _check_profiles(cls, profiles: tuple[int, ...]) -> tuple[int, ...]:
        if any(tokens < 1 for tokens in profiles) or list(profiles) != sorted(set(profiles)):
            raise ValueError("must be ascending numbers of tokens, 1 or more")
        return profiles

    @model_validator(mode="after")
    def _check_together(self) -> BuildConfig:
        if self.max_beam_width > 1:
            raise UnsupportedFeatureError(
                f"max_beam_width={self.max_beam_width}: this version has no beam search.",
                field="max_beam_width",
                remedy="Set it to 1; SamplingParams(n=..., best_of=...) draws several answers and keeps the likeliest.",
            )
        if self.kv_cache_type == "disabled":
            raise UnsupportedFeatureError(
                "kv_cache_type='disabled': engines generate, and need a cache for it.",
                field="kv_cache_type",
                remedy="Set it to 'paged'; a small KvCacheConfig.max_tokens keeps the cache small.",
            )
        if self.max_num_tokens < self.max_batch_size:
            raise InvalidParameterError(
                f"max_num_tokens ({self.max_num_tokens}) is less than max_batch_size ({self.max_batch_size}): "
                "a step of one token for each sequence would not fit.",
                field="max_num_tokens",
                remedy=f"Use {self.max_batch_size} or more, or a smaller max_batch_size.",
            )
        if self.max_seq_len is not None and self.max_input_len is not None and self.max_input_len >= self.max_seq_len:
            raise InvalidParameterError(
                f"max_input_len ({self.max_input_len}) leaves no room for an answer in max_seq_len "
                f"({self.max_seq_len}).",
                field="max_input_len",
                remedy=f"Use {self.max_seq_len - 1} or less.",
            )
        return self

    def options_of_engines(self) -> dict[str, Any]:
        """What was set of the options that nothing but a built engine can honour."""
        return {name: getattr(self, name) for name in _OPTIONS_OF_ENGINES if name in self.model_fields_set}


_OPTIONS_OF_ENGINES: Final = (
    "capture", "opt_level", "passes", "disabled_passes", "profiles", "debug_outputs", "picture", "timing_cache",
)  # fmt: skip


class LlmArgs(StrictModel):
    """All arguments of `LLM`, checked."""

    model: str | Path
    """A directory in Hugging Face format, a `.gguf` file, a hub id or an alias such as `smollm2:135m`."""
    tokenizer: Any = None
    """A path, hub id or tokenizer object to use instead of the model's own."""
    tokenizer_mode: Literal["auto", "slow"] = "auto"
    """`slow` loads the tokenizer through transformers."""
    skip_tokenizer_init: bool = False
    """Token ids in, token ids out; no tokenizer is loaded."""
    trust_remote_code: bool = False
    """Accepted for compatibility; tokenmill never runs code from a checkpoint."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Number of devices that share each layer."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations. auto: with the engine backend the formats of the checkpoint, quantized ones
    included; with the torch backend bfloat16 where the device computes in it, else float32."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    tokenizer_revision: str | None = None
    """Branch, tag or commit of a hub tokenizer."""
    backend: Literal["auto", "engine", "torch", "pytorch"] = "auto"
    """What runs the model: a compiled `engine`, built at load and kept in the cache folder, or `torch` layer by layer
    (`pytorch` is another name). auto: on a CPU the engine if it can run the model, else torch."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; auto: the first GPU, else the CPU."""
    quantization: Literal["fp8", "int8", "int8_channel", "q4_0", "q4_1", "q5_0", "q8_0"] | None = None
    """Quantize linear layers while loading: `fp8` is float8_e4m3fn with a scale for each output feature and token, on
    the torch backend; the others are formats of the engine backend, as in `BuildConfig.quantization`."""
    load_format: Literal["auto", "dummy"] = "auto"
    """`dummy`: random weights of the right shape, made on the device."""
    attn_backend: str = "auto"
    """Attention backend by name (`tokenmill inspect` lists them). auto: `triton` on a GPU. `flashinfer` runs where that
    package is installed (`pip install 'tokenmill[flashinfer]'`; its kernels are compiled on first use): in 16 bits,
    with heads of 64, 128 or 256, without CUDA graphs."""
    max_batch_size: int = Field(default=64, ge=1)
    """Most sequences that run at the same time."""
    max_num_tokens: int | None = Field(default=None, ge=1)
    """Most tokens computed in one step, over all sequences. None: 2048; on a CPU 512 with chunked prefill, since a step
    of 2048 tokens takes seconds there, in which nobody else gets a token and nothing shows that the engine lives."""
    max_seq_len: int | None = Field(default=None, ge=2)
    """Longest prompt plus answer, in tokens; None: the model's context."""
    enable_chunked_prefill: bool = True
    """Split long prompts over steps and mix them with running answers."""
    kv_cache_config: KvCacheConfig = Field(default_factory=KvCacheConfig)
    """The paged cache."""
    scheduler_config: SchedulerConfig = Field(default_factory=SchedulerConfig)
    """Admission and order."""
    deterministic: bool = False
    """Give a prompt the same greedy tokens whatever else is computed beside it, in however many steps, with the prefix
    cache or without, preempted or not: every number is computed in one way for all batches, which costs speed. On a
    CPU with the engine backend, on a GPU in 16 bits."""
    enable_cuda_graphs: bool = True
    """Replay decode steps from CUDA graphs, on a GPU."""
    disable_overlap_scheduler: bool = False
    """Wait for each step before the next is planned; by default a GPU computes one step while the next is planned."""
    stats_config: StatsConfig = Field(default_factory=StatsConfig)
    """Records of steps and requests."""
    max_queue_size: int = Field(default=4096, ge=1)
    """Most requests that may wait; one more is refused with `QueueFullError`."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads for tensor work; None: one for each core."""
    num_replicas: int = Field(default=0, ge=0, le=64)
    """Worker processes, each with a copy of the model; 0: the engine runs in the caller's process."""
    num_postprocess_workers: int = Field(default=0, ge=0, le=64)
    """Processes that turn tokens into text; 0: the process that owns the engine does. Needs `num_replicas`."""
    worker_config: WorkerConfig = Field(default_factory=WorkerConfig)
    """Start, watch and end of worker processes."""

    build_config: BuildConfig | None = None
    """How the engine is built, for scripts that have a `BuildConfig` and for options that only a build has (`passes`,
    `debug_outputs`, ...; with them the backend is the engine). What is an argument here, too, such as `max_batch_size`,
    is taken from it; another value beside it is refused. Fields that are not set are as without it."""

    @field_validator("build_config", mode="before")
    @classmethod
    def _keep_what_was_set(cls, value: Any) -> Any:
        """Pydantic's private copy of a configuration would have all fields set."""
        return value.model_dump(exclude_unset=True) if isinstance(value, BuildConfig) else value

    @field_serializer("build_config")
    def _tell_what_was_set(self, value: BuildConfig | None, info: FieldSerializationInfo) -> dict[str, Any] | None:
        return None if value is None else value.model_dump(mode=info.mode, exclude_unset=True)

    @model_validator(mode="after")
    def _check_together(self) -> LlmArgs:
        if self.build_config is not None:
            self._take(self.build_config)
        if self.num_postprocess_workers and not self.num_replicas:
            raise InvalidParameterError(
                f"num_postprocess_workers is {self.num_postprocess_workers}, but num_replicas is 0.",
                field="num_postprocess_workers",
                remedy="Set num_replicas to 1 or more: postprocessing workers serve worker processes.",
            )
        return self

    def _take(self, build: BuildConfig) -> None:
        """Arguments that `build` has, too."""
        if build.strip_weights:
            raise InvalidParameterError(
                "build_config.strip_weights: an LLM runs the engine, which needs its weights.",
                field="strip_weights",
                remedy="Leave it out; Engine.strip makes an engine without weights.",
            )
        for name in _ALSO_OF_BUILDS:
            if name in build.model_fields_set:
                own = getattr(self, name) if name in self.model_fields_set else None
                if _agreed(name, own, getattr(build, name)):
                    self._set(name, getattr(build, name))
        formats = {"auto": None, "int8_group32": "int8"}
        quantization = formats.get(build.quantization, build.quantization)
        if _agreed("quantization", self.quantization, quantization) and quantization != "none":
            self._set("quantization", quantization)
        if _agreed("kv_cache_dtype", self.kv_cache_config.dtype, build.kv_cache_dtype):
            self._set("kv_cache_config", self.kv_cache_config.model_copy(update={"dtype": build.kv_cache_dtype}))

    def _set(self, name: str, value: Any) -> None:
        """Without another round of checks."""
        self.__dict__[name] = value
        self.__pydantic_fields_set__.add(name)


_ALSO_OF_BUILDS: Final = (
    "max_batch_size", "max_num_tokens", "max_seq_len", "dtype", "device", "revision", "num_threads",
)  # fmt: skip


def _agreed(name: str, own: Any, of_build: Any) -> bool:
    """Whether an argument has to be taken from a `BuildConfig`. None and `auto` say nothing.

    Raises:
        InvalidParameterError: both say something, and not the same.
    """
    if of_build in (None, "auto"):
        return False
    if own in (None, "auto"):
        return True
    if own != of_build and not (name == "device" and own.startswith(f"{of_build}:")):
        raise InvalidParameterError(
            f"{name} is {own!r} as an argument and {of_build!r} in build_config.",
            field=name,
            remedy="Give it in one of the two.",
        )
    return False
