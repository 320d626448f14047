"""Options that several commands share, as dataclasses that `cli.command` expands, and the configuration file.

A flag wins over the file, the file over the default. Values are checked by `LlmArgs` and `SamplingParams`, so that the
command line and the Python API refuse the same things with the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from tokenmill.cli.option_kinds import number, switch, word
from tokenmill.errors import InvalidParameterError, UnknownParameterError, UserError

if TYPE_CHECKING:
    from tokenmill.config import LlmArgs
    from tokenmill.sampling_params import SamplingParams

DEFAULT_MODEL = "smollm2:135m"
"""The demo model: what a command uses when none is named."""

DEFAULT_MAX_TOKENS = 1024
"""Longest answer of `run` and `chat` when no option says it: small models may never end theirs."""

ONE_SEQUENCE: Mapping[str, Any] = MappingProxyType({"max_batch_size": 1})
"""Defaults of `run` and `chat`: a cache for one sequence is small, and allocated at once."""

MODEL_CONTEXT = "the model's context"
"""The default of a longest sequence, as help shows it."""

_OF_THE_PROGRAM = ("config", "kv_cache_tokens")
"""Options that are no arguments of `LLM` under their own names."""

_MODEL_PANEL = "Model and engine"
_SAMPLING_PANEL = "Sampling"


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How the model is loaded and the engine sized."""

    dtype: Annotated[
        str | None, word("TYPE", "auto, float32, bfloat16 or float16.", panel=_MODEL_PANEL, default="auto")
    ] = None
    device: Annotated[str | None, word("DEVICE", "auto, cpu, cuda or cuda:N.", panel=_MODEL_PANEL, default="auto")] = (
        None
    )
    max_batch_size: Annotated[
        int | None,
        number("Most sequences that run at the same time.", panel=_MODEL_PANEL, default="64; run, chat: 1"),
    ] = None
    max_seq_len: Annotated[
        int | None,
        number("Longest prompt plus answer, in tokens.", panel=_MODEL_PANEL, default=MODEL_CONTEXT, at_least=2),
    ] = None
    max_num_tokens: Annotated[
        int | None,
        number("Most tokens computed in one step.", panel=_MODEL_PANEL, default="2048; on a CPU: 512"),
    ] = None
    kv_cache_tokens: Annotated[
        int | None, number("Size of the KV cache in tokens.", panel=_MODEL_PANEL, default="from free memory")
    ] = None
    backend: Annotated[
        str | None, word("NAME", "auto, engine (compiled) or torch.", panel=_MODEL_PANEL, default="auto")
    ] = None
    load_format: Annotated[
        str | None,
        word("FORMAT", "auto, or dummy: random weights of the right shape.", panel=_MODEL_PANEL, default="auto"),
    ] = None
    quantization: Annotated[
        str | None,
        word(
            "FORMAT",
            "Quantize while loading: fp8 (torch), int8, q4_0, ... (engine).",
            panel=_MODEL_PANEL,
            default="none",
        ),
    ] = None
    deterministic: Annotated[
        bool, switch("--deterministic", "Same greedy tokens in every batch; slower.", panel=_MODEL_PANEL)
    ] = False
    num_threads: Annotated[
        int | None, number("CPU threads for tensor work.", panel=_MODEL_PANEL, default="one for each core")
    ] = None
    config: Annotated[
        Path | None,
        word("FILE.yaml", "Any argument of LLM, nested as in Python; flags win over it.", panel=_MODEL_PANEL),
    ] = None

    def llm_arguments(self, model: str | None, **defaults: Any) -> dict[str, Any]:
        """Keyword arguments for `LLM`: `defaults`, overridden by the configuration file, overridden by the flags.

        Raises:
            UserError: the file cannot be read, or holds an unknown or invalid argument; `field` names it.
        """
        from_file = {} if self.config is None else read_config_file(self.config)
        flags = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _OF_THE_PROGRAM}
        flags = {name: value for name, value in flags.items() if value is not None and value is not False}
        if self.kv_cache_tokens is not None:
            flags["kv_cache_config"] = {"max_tokens": self.kv_cache_tokens}
        if model is not None:
            flags["model"] = model
        if from_file.get("build_config"):  # it has fields that are arguments, too
            built = {name: value for name, value in from_file["build_config"].items() if name not in flags}
            defaults = {name: value for name, value in defaults.items() if name not in built}
            from_file = {**from_file, "build_config": built}
        arguments = _merged(_merged(defaults, from_file), flags)
        arguments.setdefault("model", DEFAULT_MODEL)
        checked_arguments(arguments)
        return arguments


@dataclass(frozen=True, slots=True)
class ServingOptions(ModelOptions):
    """The same for a program that serves many for long."""

    num_replicas: Annotated[
        int | None,
        number(
            "Worker processes that each run the model and are restarted when they die; 0: this process.",
            panel=_MODEL_PANEL,
            default="0",
            at_least=0,
        ),
    ] = None


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` updated with `over`; tables inside are updated key by key."""
    merged = dict(base)
    for name, value in over.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def checked_arguments(arguments: dict[str, Any]) -> LlmArgs:
    """`arguments` as `LlmArgs`, before anything slow is imported or loaded.

    Raises:
        UserError: an argument is unknown or invalid.
    """
    from tokenmill.config import LlmArgs

    return LlmArgs(**arguments)


def read_config_file(path: Path) -> dict[str, Any]:
    """The arguments of `LLM` in a YAML file, checked for unknown names and bad values.

    Raises:
        UserError: the file cannot be read, is not YAML, or holds something that `LLM` does not take.
    """
    content = read_table(path)
    try:
        checked_arguments({"model": DEFAULT_MODEL, **content})
    except UserError as error:
        kind = UnknownParameterError if isinstance(error, UnknownParameterError) else InvalidParameterError
        raise kind(f"{path}: {error.message}", field=error.field, remedy=error.remedy) from None
    return content


def read_table(path: Path) -> dict[str, Any]:
    """The arguments in a YAML file, by name; none if it is empty.

    Raises:
        InvalidParameterError: the file cannot be read, is not YAML, or holds no table.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidParameterError(
            f"The configuration file {path} cannot be read: {error.strerror or error}.", field="config"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidParameterError(f"{path} is not valid YAML: {error}.", field="config") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InvalidParameterError(
            f"{path} does not hold a table of arguments.",
            field="config",
            remedy="Write lines such as 'max_batch_size: 8'.",
        )
    return content


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen and when an answer ends."""

    max_tokens: Annotated[
        int | None, number("Most tokens of an answer.", panel=_SAMPLING_PANEL, default=str(DEFAULT_MAX_TOKENS))
    ] = None
    temperature: Annotated[
        float | None, word("X", "0 takes the most likely token; higher is freer.", panel=_SAMPLING_PANEL)
    ] = None
    top_k: Annotated[
        int | None, number("Sample from the k most likely tokens.", panel=_SAMPLING_PANEL, at_least=None)
    ] = None
    top_p: Annotated[
        float | None, word("X", "Sample from the likeliest tokens up to this probability.", panel=_SAMPLING_PANEL)
    ] = None
    min_p: Annotated[
        float | None, word("X", "Drop tokens below this share of the best one's probability.", panel=_SAMPLING_PANEL)
    ] = None
    repetition_penalty: Annotated[float | None, word("X", "Above 1: repeat less.", panel=_SAMPLING_PANEL)] = None
    seed: Annotated[int | None, number("Makes sampling repeatable.", panel=_SAMPLING_PANEL, at_least=None)] = None
    stop: Annotated[
        list[str] | None, word("TEXT", "End the answer before this text; may be repeated.", panel=_SAMPLING_PANEL)
    ] = None

    def sampling_parameters(self) -> dict[str, Any]:
        """What was set, as keyword arguments of `SamplingParams`.

        Raises:
            UserError: a value is out of range; `field` names it.
        """
        names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
        values = {name: getattr(self, name) for name in names if getattr(self, name) not in (None, [])}
        checked_sampling(values)
        return values


def checked_sampling(values: dict[str, Any]) -> SamplingParams:
    """`values` as `SamplingParams`.

    Raises:
        UserError: a name is unknown or a value out of range.
    """
    from tokenmill.sampling_params import SamplingParams

    return SamplingParams(**values)
