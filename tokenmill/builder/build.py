"""`build`: from a checkpoint to an engine. Each phase is a module of this folder; this one hands results on.

resolve the model -> capture its graph -> choose formats -> passes -> lower to a program -> plan memory
-> pack weights -> put the engine together
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from tokenmill.builder.capture import capture
from tokenmill.builder.engine import Engine
from tokenmill.builder.engine_picture import draw
from tokenmill.builder.formats import FormatChoice, choose_formats
from tokenmill.builder.graph import Graph, assign_formats
from tokenmill.builder.lowering import lower
from tokenmill.builder.memory_plan import memory_report, plan_memory
from tokenmill.builder.packing import choose_layouts, pack_weights
from tokenmill.builder.pass_selection import disabled_passes, pass_target
from tokenmill.builder.passes import PassReport, run_passes
from tokenmill.builder.report import BuildReport, count_kinds, weight_bytes
from tokenmill.builder.tokenizer_files import tokenizer_files
from tokenmill.builder.tune_program import tune_program
from tokenmill.builder.weight_source import WeightSource
from tokenmill.checkpoints.base import Checkpoint, open_checkpoint
from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.config import BuildConfig
from tokenmill.env import read_environment
from tokenmill.errors import InvalidParameterError, did_you_mean
from tokenmill.models.config import ModelConfig
from tokenmill.program.checks import check_program
from tokenmill.program.engine_config import EngineConfig, LimitsRecord, ModelRecord, TargetRecord, is_engine
from tokenmill.program.package import PICTURE_NAME, TIMING_CACHE_NAME, FileContent
from tokenmill.program.program import Program
from tokenmill.program.timing_cache import TimingCache
from tokenmill.version import __version__

ProgressCallback = Callable[[str, int, int], None]
"""Called with the phase, what is done of it, and all of it. Phases: resolve, capture, passes, lower, tune, pack."""


def build(
    model: str | Path,
    config: BuildConfig | None = None,
    *,
    on_progress: ProgressCallback | None = None,
    on_passes: Callable[[list[PassReport]], None] | None = None,
    **options: Any,
) -> Engine:
    """Compile `model` to an engine.

    Args:
        model: a directory in Hugging Face format, a `.gguf` file, a hub id or an alias, as for `LLM`.
        config: how; None: the defaults.
        on_progress: told about the progress.
        on_passes: given what every pass did, with the graphs before and after it.
        options: fields of `BuildConfig`, instead of `config`.

    Raises:
        UserError: the model or a parameter cannot be used; `field` names the parameter.
    """
    if config is not None and options:
        raise InvalidParameterError(f"Both config and {next(iter(options))} are given.", field="config")
    config = BuildConfig(**options) if config is None else config.model_copy(deep=True)
    builder = _Builder(str(model), config, on_progress or (lambda phase, done, total: None))
    with builder.phase("resolve"):
        path = resolve_model(model, revision=config.revision)
        _refuse_engine(path)
        checkpoint = open_checkpoint(path)
        model_config = ModelConfig.from_hf(checkpoint.hf_config)
        settings = _settings(config, checkpoint, model_config)
        source = WeightSource(checkpoint, model_config)
    program, constants, choice = builder.compile(model_config, settings, source, on_passes)
    with builder.phase("tune"):
        timings = builder.timings(program, settings)
    with builder.phase("pack"):
        source.check(program.weights)
        weights = {}
        if not config.strip_weights:
            weights = pack_weights(program, source, constants, lambda _, done, total: builder.tell("pack", done, total))
        else:
            weights = pack_weights(_constants_only(program), source, constants)
    engine = builder.engine(checkpoint, settings, program, choice, weights)
    files: dict[str, FileContent] = {} if timings is None else {TIMING_CACHE_NAME: timings.encode()}
    if config.picture and builder.passes:
        files[PICTURE_NAME] = draw(engine.config, builder.passes).encode()
    return engine.with_files(files)


@dataclass(frozen=True, slots=True)
class _Settings:
    """What is automatic in a `BuildConfig`, resolved."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    kv_cache_dtype: str
    limits: LimitsRecord


@dataclass(slots=True)
class _Builder:
    """One build: its arguments, and what is said about it."""

    model: str
    config: BuildConfig
    tell: ProgressCallback
    seconds: dict[str, float] = field(default_factory=dict)
    num_nodes: dict[str, int] = field(default_factory=dict)
    tuned: dict[str, int] = field(default_factory=dict)
    passes: list[PassReport] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures the time, and tells the beginning."""
        self.tell(name, 0, 1)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 4)

    def compile(
        self,
        model_config: ModelConfig,
        settings: _Settings,
        source: WeightSource,
        on_passes: Callable[[list[PassReport]], None] | None,
    ) -> tuple[Program, dict[str, tuple[float, ...]], FormatChoice]:
        """The program, the values of its constants, and the formats of the weights."""
        with self.phase("capture"):
            proofs = read_environment().cache_dir / "captures"
            dtype = getattr(torch, settings.dtype)
            graph = capture(model_config, dtype=dtype, method=self.config.capture, proofs=proofs)
            choice = choose_formats(graph, source, self.config.quantization, settings.dtype)
            graph = assign_formats(graph, choice.formats)
            self.num_nodes["captured"] = len(graph.nodes)
        with self.phase("passes"):
            graph, reports = run_passes(
                graph, disabled=disabled_passes(self.config), target=pass_target(settings.device)
            )
            self.num_nodes["after_passes"] = len(graph.nodes)
            if on_passes is not None:
                on_passes(reports)
        self.passes = reports
        with self.phase("lower"):
            program = self._lowered(graph, settings)
        return program, dict(graph.constants), choice

    def _lowered(self, graph: Graph, settings: _Settings) -> Program:
        limits = settings.limits
        program = choose_layouts(lower(graph), settings.device)
        keep = _debug_outputs(self.config.debug_outputs, program).values()
        program = plan_memory(program, max_tokens=limits.max_num_tokens, max_rows=limits.max_num_rows, keep=keep)
        check_program(program, max_tokens=limits.max_num_tokens, max_rows=limits.max_num_rows)
        return program

    def timings(self, program: Program, settings: _Settings) -> TimingCache | None:
        """Times of the variants of the program's kernels; None if there are none to choose from."""
        if settings.device != "cpu" or self.config.opt_level < 2:
            return None
        report = tune_program(self.config, program, settings.limits, lambda done, of: self.tell("tune", done, of))
        self.tuned = {"measured": report.num_measured, "reused": report.num_reused}
        return report.cache if report.cache.times else None

    def engine(
        self,
        checkpoint: Checkpoint,
        settings: _Settings,
        program: Program,
        choice: FormatChoice,
        weights: dict[str, Any],
    ) -> Engine:
        """Everything together."""
        limits = settings.limits
        debug_outputs = _debug_outputs(self.config.debug_outputs, program)
        memory = memory_report(
            program,
            max_tokens=limits.max_num_tokens,
            max_rows=limits.max_num_rows,
            keep=debug_outputs.values(),
        )
        report = BuildReport(
            nodes_captured=self.num_nodes["captured"],
            nodes_after_passes=self.num_nodes["after_passes"],
            operations=count_kinds(program),
            weight_bytes=weight_bytes(program, weights),
            arena_bytes=memory.arena_bytes,
            arena_sum_bytes=memory.sum_bytes,
            kernels=self.tuned,
            seconds=self.seconds,
            notices=[*choice.notices, *_notices(self.config)],
        )
        tokenizer, files = tokenizer_files(checkpoint)
        config = EngineConfig(
            tokenmill_version=__version__,
            model=ModelRecord(
                name=self.model,
                hf_config=checkpoint.hf_config,
                checkpoint_format=checkpoint.format,
                quantization=checkpoint.quantization,
            ),
            target=TargetRecord(device=settings.device, architecture="any", instruction_set="any"),
            limits=limits,
            dtype=settings.dtype,
            kv_cache_dtype=settings.kv_cache_dtype,
            quantization=choice.quantization,
            tokenizer=tokenizer,
            stripped=self.config.strip_weights,
            debug_outputs=debug_outputs,
            build_config=self.config.model_dump(mode="json"),
            report=report.to_dict(),
        )
        path = None if tokenizer is None else Path(checkpoint.path)
        return Engine(config=config, program=program, weights=weights, files=files, tokenizer_path=path)


def _refuse_engine(path: Path) -> None:
    if is_engine(path):
        raise InvalidParameterError(
            f"{path} is an engine, which is built already.",
            field="model",
            remedy="Name the model's checkpoint; `tokenmill refit` gives an engine new weights.",
        )


def _settings(config: BuildConfig, checkpoint: Checkpoint, model: ModelConfig) -> _Settings:
    device: Literal["cpu", "cuda"] = "cpu"
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        device = "cuda"
    is_bfloat16 = checkpoint.format != "gguf" and model.dtype == "bfloat16"
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if is_bfloat16 else "float32"
    cache = config.kv_cache_dtype
    if cache == "auto":
        quantization = checkpoint.quantization if config.quantization == "auto" else config.quantization
        # Where weights were rounded to a few bits, keys and values of 8 bits' precision change nothing that counts.
        cache = "bfloat16" if device == "cpu" and quantization != "none" else dtype if device == "cuda" else "float32"
    context = model.max_position_embeddings
    max_seq_len = config.max_seq_len or context
    if max_seq_len > context:
        raise InvalidParameterError(
            f"max_seq_len ({max_seq_len}) is more than the model's context ({context}).",
            field="max_seq_len",
            remedy=f"Use {context} or less.",
        )
    max_input_len = config.max_input_len or max_seq_len - 1
    if max_input_len >= max_seq_len:
        raise InvalidParameterError(
            f"max_input_len ({max_input_len}) leaves no room for an answer in max_seq_len ({max_seq_len}).",
            field="max_input_len",
            remedy=f"Use {max_seq_len - 1} or less.",
        )
    limits = LimitsRecord(
        max_batch_size=config.max_batch_size,
        max_num_tokens=config.max_num_tokens,
        max_input_len=max_input_len,
        max_seq_len=max_seq_len,
        max_beam_width=config.max_beam_width,
    )
    return _Settings(device, dtype, cache, limits)


def _notices(config: BuildConfig) -> list[str]:
    """What is done in another way than the caller asked for, with the same results."""
    if config.kv_cache_type == "continuous":
        return ["kv_cache_type 'continuous' is served by the paged cache"]
    return []


def _constants_only(program: Program) -> Program:
    return replace(program, weights=tuple(weight for weight in program.weights if not weight.parts))


def _debug_outputs(names: tuple[str, ...], program: Program) -> dict[str, str]:
    """The buffer that each of these operations writes."""
    outputs = {operation.name: operation.outputs for operation in program.operations}
    found = {}
    for name in names:
        if name not in outputs:
            raise InvalidParameterError(
                f"The engine has no operation '{name}'.", field="debug_outputs", remedy=did_you_mean(name, outputs)
            )
        if "y" not in outputs[name]:
            raise InvalidParameterError(f"The operation '{name}' has no output.", field="debug_outputs")
        found[name] = outputs[name]["y"].buffer
    return found
