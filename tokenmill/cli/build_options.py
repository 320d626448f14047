"""The options of `tokenmill build`. Values are checked by `BuildConfig`, so that Python refuses the same."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from tokenmill.cli.option_kinds import number, switch, word
from tokenmill.cli.options import MODEL_CONTEXT, read_table

_SIZES = "Largest sizes"
_NUMBERS = "Formats"
_BUILDER = "Builder"


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How the engine is built."""

    max_batch_size: Annotated[int | None, number("Sequences at a time.", panel=_SIZES, default="64")] = None
    max_num_tokens: Annotated[int | None, number("Tokens of one step.", panel=_SIZES, default="2048")] = None
    max_input_len: Annotated[
        int | None, number("Tokens of a prompt.", panel=_SIZES, default="max-seq-len less one")
    ] = None
    max_seq_len: Annotated[
        int | None, number("Tokens of prompt and answer.", panel=_SIZES, default=MODEL_CONTEXT, at_least=2)
    ] = None
    dtype: Annotated[
        str | None,
        word("TYPE", "Weights that are not quantized: auto, float32 or bfloat16.", panel=_NUMBERS, default="auto"),
    ] = None
    quantization: Annotated[
        str | None,
        word(
            "FORMAT",
            "Linear weights: auto (the file's own), none, int8, int8_channel, q4_0, q4_1, q5_0 or q8_0.",
            panel=_NUMBERS,
            default="auto",
        ),
    ] = None
    kv_cache_dtype: Annotated[
        str | None,
        word("TYPE", "Cached keys and values: auto, float32 or bfloat16.", panel=_NUMBERS, default="auto"),
    ] = None
    device: Annotated[str | None, word("DEVICE", "auto, cpu or cuda.", panel=_BUILDER, default="auto")] = None
    opt_level: Annotated[
        int | None,
        number(
            "0: no passes; 1: all passes; 2: measure kernel variants too.", panel=_BUILDER, default="2", at_least=None
        ),
    ] = None
    disable_pass: Annotated[list[str] | None, word("NAME", "Leave a pass out; may be repeated.", panel=_BUILDER)] = None
    debug_output: Annotated[
        list[str] | None, word("NAME", "Keep an operation's result after a step; may be repeated.", panel=_BUILDER)
    ] = None
    strip_weights: Annotated[
        bool, switch("--strip-weights", "Leave the weights out, for tokenmill refit.", panel=_BUILDER)
    ] = False
    timing_cache: Annotated[
        Path | None,
        word("FILE", "Measured kernel variants, read and added to.", panel=_BUILDER, default="in the cache folder"),
    ] = None
    num_threads: Annotated[
        int | None, number("Threads to measure with.", panel=_BUILDER, default="one for each core")
    ] = None
    config: Annotated[
        Path | None,
        word(
            "FILE",
            "YAML file with fields of BuildConfig, such as 'passes' and 'profiles'. Flags win over it.",
            panel=_BUILDER,
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
