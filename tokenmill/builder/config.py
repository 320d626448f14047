"""`BuildConfig`: everything that a user may say about how an engine is built."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from tokenmill.config import StrictModel
from tokenmill.errors import InvalidParameterError, UnsupportedFeatureError

Quantization = Literal["auto", "none", "int8", "int8_group32", "int8_channel", "q4_0", "q4_1", "q5_0", "q8_0"]


class BuildConfig(StrictModel):
    """How an engine is built. Sizes are the largest that it will serve; smaller steps need no other engine."""

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
    quantization: Quantization = "auto"
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
