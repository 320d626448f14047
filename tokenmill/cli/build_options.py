"""The options of `tokenmill build`. Values are checked by `BuildConfig`, so that Python refuses the same."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenmill.cli.options import read_table

_SIZES = "Largest sizes"
_NUMBERS = "Formats"
_BUILDER = "Builder"


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How the engine is built."""

    max_batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Sequences at a time.", rich_help_panel=_SIZES, show_default="64"),
    ] = None
    max_num_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Tokens of one step.", rich_help_panel=_SIZES, show_default="2048"),
    ] = None
    max_input_len: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Tokens of a prompt.", rich_help_panel=_SIZES, show_default="max-seq-len less one"
        ),
    ] = None
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Tokens of prompt and answer.",
            rich_help_panel=_SIZES,
            show_default="the model's context",
        ),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Weights that are not quantized: auto, float32 or bfloat16.",
            rich_help_panel=_NUMBERS,
            show_default="auto",
        ),
    ] = None
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Linear weights: auto (the file's own), none, int8, int8_channel, q4_0, q4_1, q5_0 or q8_0.",
            rich_help_panel=_NUMBERS,
            show_default="auto",
        ),
    ] = None
    kv_cache_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Cached keys and values: auto, float32 or bfloat16.",
            rich_help_panel=_NUMBERS,
            show_default="auto",
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="auto, cpu or cuda.", rich_help_panel=_BUILDER, show_default="auto"),
    ] = None
    opt_level: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="0: no passes; 1: all passes; 2: measure kernel variants too.",
            rich_help_panel=_BUILDER,
            show_default="2",
        ),
    ] = None
    disable_pass: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Leave a pass out; may be repeated.", rich_help_panel=_BUILDER),
    ] = None
    debug_output: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Keep an operation's result after a step; may be repeated.", rich_help_panel=_BUILDER
        ),
    ] = None
    strip_weights: Annotated[
        bool,
        typer.Option("--strip-weights", help="Leave the weights out, for tokenmill refit.", rich_help_panel=_BUILDER),
    ] = False
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Measured kernel variants, read and added to.",
            rich_help_panel=_BUILDER,
            show_default="in the cache folder",
        ),
    ] = None
    num_threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Threads to measure with.",
            rich_help_panel=_BUILDER,
            show_default="one for each core",
        ),
    ] = None
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML file with fields of BuildConfig, such as 'passes' and 'profiles'. Flags win over it.",
            rich_help_panel=_BUILDER,
        ),
    ] = None

    def build_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `BuildConfig`.

        Raises:
            UserError: the configuration file cannot be read.
        """
        arguments = {} if self.config is None else read_table(self.config)
        renamed = {"disable_pass": "disabled_passes", "debug_output": "debug_outputs"}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "config" and value not in (None, [], False):
                arguments[renamed.get(field.name, field.name)] = value
        return arguments
