"""Options that several commands share, as dataclasses that `cli.command` expands, and the configuration file.

A flag wins over the file, the file over the default. Values are checked by `LlmArgs` and `SamplingParams`, so that the
command line and the Python API refuse the same things with the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

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

_MODEL_PANEL = "Model and engine"
_SAMPLING_PANEL = "Sampling"


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How the model is loaded and the engine sized."""

    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="auto, float32, bfloat16 or float16.",
            rich_help_panel=_MODEL_PANEL,
            show_default="auto",
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE", help="auto, cpu, cuda or cuda:N.", rich_help_panel=_MODEL_PANEL, show_default="auto"
        ),
    ] = None
    max_batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Most sequences that run at the same time.",
            show_default="64; run, chat: 1",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = None
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Longest prompt plus answer, in tokens.",
            rich_help_panel=_MODEL_PANEL,
            show_default="the model's context",
        ),
    ] = None
    max_num_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Most tokens computed in one step.",
            show_default="2048; on a CPU: 512",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = None
    kv_cache_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Size of the KV cache in tokens.",
            rich_help_panel=_MODEL_PANEL,
            show_default="from free memory",
        ),
    ] = None
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="auto, engine (compiled) or torch.",
            rich_help_panel=_MODEL_PANEL,
            show_default="auto",
        ),
    ] = None
    load_format: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="auto, or dummy: random weights of the right shape.",
            rich_help_panel=_MODEL_PANEL,
            show_default="auto",
        ),
    ] = None
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Quantize while loading: fp8 (torch), int8, q4_0, ... (engine).",
            rich_help_panel=_MODEL_PANEL,
            show_default="none",
        ),
    ] = None
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Same greedy tokens in every batch; slower.",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = False
    num_replicas: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Worker processes that each run the model and are restarted when they die; 0: this process.",
            rich_help_panel=_MODEL_PANEL,
            show_default="0",
        ),
    ] = None
    num_threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="CPU threads for tensor work.",
            show_default="torch's choice",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = None
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Any argument of LLM, nested as in Python; flags win over it.",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = None

    def llm_arguments(self, model: str | None, **defaults: Any) -> dict[str, Any]:
        """Keyword arguments for `LLM`: `defaults`, overridden by the configuration file, overridden by the flags.

        Raises:
            UserError: the file cannot be read, or holds an unknown or invalid argument; `field` names it.
        """
        from_file = {} if self.config is None else read_config_file(self.config)
        arguments = _merged(defaults, from_file)
        names = (
            "dtype", "device", "max_batch_size", "max_seq_len", "max_num_tokens", "backend",
            "load_format",
            "num_threads", "quantization", "num_replicas",
        )  # fmt: skip
        flags = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.deterministic:
            flags["deterministic"] = True
        if self.kv_cache_tokens is not None:
            flags["kv_cache_config"] = {"max_tokens": self.kv_cache_tokens}
        if model is not None:
            flags["model"] = model
        arguments = _merged(arguments, flags)
        arguments.setdefault("model", DEFAULT_MODEL)
        checked_arguments(arguments)
        return arguments


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
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Most tokens of an answer.",
            rich_help_panel=_SAMPLING_PANEL,
            show_default=str(DEFAULT_MAX_TOKENS),
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="0 takes the most likely token; higher is freer.", rich_help_panel=_SAMPLING_PANEL
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(metavar="N", help="Sample from the k most likely tokens.", rich_help_panel=_SAMPLING_PANEL),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Sample from the likeliest tokens up to this probability.",
            rich_help_panel=_SAMPLING_PANEL,
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Drop tokens below this share of the best one's probability.",
            rich_help_panel=_SAMPLING_PANEL,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(metavar="X", help="Above 1: repeat less.", rich_help_panel=_SAMPLING_PANEL),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Makes sampling repeatable.", rich_help_panel=_SAMPLING_PANEL),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="End the answer before this text; may be repeated.", rich_help_panel=_SAMPLING_PANEL
        ),
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
