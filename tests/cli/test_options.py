"""Flags, configuration file and defaults become arguments of `LLM`; wrong ones are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tokenmill.cli.options import DEFAULT_MODEL, ModelOptions, SamplingOptions, ServingOptions, read_config_file
from tokenmill.config import LlmArgs
from tokenmill.errors import InvalidParameterError, UnknownParameterError, UserError


def config_file(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_become_arguments() -> None:
    options = ServingOptions(dtype="float32", max_batch_size=3, kv_cache_tokens=640, deterministic=True, num_replicas=1)
    assert options.llm_arguments("some/model") == {
        "model": "some/model", "dtype": "float32", "max_batch_size": 3, "deterministic": True, "num_replicas": 1,
        "kv_cache_config": {"max_tokens": 640},
    }  # fmt: skip


def test_no_worker_process_is_a_choice(tmp_path: Path) -> None:
    path = config_file(tmp_path, "num_replicas: 2\n")
    assert ServingOptions(config=path).llm_arguments("a/model")["num_replicas"] == 2
    assert ServingOptions(config=path, num_replicas=0).llm_arguments("a/model")["num_replicas"] == 0


def test_without_flags_the_demo_model_runs_with_defaults() -> None:
    assert ModelOptions().llm_arguments(None) == {"model": DEFAULT_MODEL}


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = config_file(
        tmp_path,
        "model: in/file\ndtype: float32\nmax_batch_size: 4\n"
        "kv_cache_config:\n  max_tokens: 100\n  tokens_per_block: 16\n",
    )
    options = ModelOptions(config=path, max_batch_size=9, kv_cache_tokens=200)
    arguments = options.llm_arguments(None, kv_cache_config={"enable_block_reuse": False, "max_tokens": 1})
    assert arguments == {
        "model": "in/file", "dtype": "float32", "max_batch_size": 9,
        "kv_cache_config": {"enable_block_reuse": False, "max_tokens": 200, "tokens_per_block": 16},
    }  # fmt: skip
    assert LlmArgs(**arguments).kv_cache_config.tokens_per_block == 16
    assert options.llm_arguments("on/command/line")["model"] == "on/command/line"


def test_a_build_configuration_in_the_file_is_between_defaults_and_flags(tmp_path: Path) -> None:
    path = config_file(tmp_path, "build_config:\n  max_batch_size: 4\n  max_seq_len: 128\n  opt_level: 1\n")
    arguments = LlmArgs(**ModelOptions(config=path).llm_arguments("m", max_batch_size=1))
    assert (arguments.max_batch_size, arguments.max_seq_len) == (4, 128)
    arguments = LlmArgs(**ModelOptions(config=path, max_batch_size=9).llm_arguments("m", max_batch_size=1))
    assert (arguments.max_batch_size, arguments.max_seq_len) == (9, 128)
    assert arguments.build_config is not None and arguments.build_config.options_of_engines() == {"opt_level": 1}


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert read_config_file(config_file(tmp_path, "# nothing\n")) == {}


@pytest.mark.parametrize(
    ("text", "error", "field", "message"),
    [
        ("max_batchsize: 3", UnknownParameterError, "max_batchsize", "Did you mean 'max_batch_size'"),
        (
            "kv_cache_config:\n  max_token: 3",
            UnknownParameterError,
            "max_token",
            "Did you mean 'max_tokens'",
        ),
        ("max_batch_size: many", InvalidParameterError, "max_batch_size", "'many'"),
        ("max_batch_size: yes", InvalidParameterError, "max_batch_size", "not a boolean"),
        ("max_batch_size: 0", InvalidParameterError, "max_batch_size", "greater than or equal to 1"),
        (
            "scheduler_config:\n  capacity_scheduler_policy: EVICT",
            InvalidParameterError,
            "capacity_scheduler_policy",
            "EVICT",
        ),
        ("- a\n- b", InvalidParameterError, "config", "does not hold a table"),
        ("3: 4", InvalidParameterError, "config", "does not hold a table"),
        ("a: [", InvalidParameterError, "config", "is not valid YAML"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, error: type[UserError], field: str, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        ModelOptions(config=config_file(tmp_path, text)).llm_arguments(None)
    assert "config.yaml" in str(caught.value)
    assert caught.value.field == field


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="cannot be read: No such file"):
        read_config_file(tmp_path / "none.yaml")
    with pytest.raises(InvalidParameterError, match="cannot be read"):
        read_config_file(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InvalidParameterError, match="not valid YAML"):
        read_config_file(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"dtype": "float33"}, "dtype"),
        ({"load_format": "fast"}, "load_format"),
        ({"max_seq_len": 1}, "max_seq_len"),
        ({"max_num_tokens": -1}, "max_num_tokens"),
        ({"kv_cache_tokens": 0}, "max_tokens"),
    ],
)
def test_wrong_flags_are_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        ModelOptions(**changes).llm_arguments(None)
    assert caught.value.field == field


def test_defaults_in_the_help_are_those_of_llm() -> None:
    """The help says what happens without a flag; the values live in `LlmArgs`."""
    from typing import get_type_hints

    shown = {
        name: hint.__metadata__[0].show_default
        for name, hint in get_type_hints(ModelOptions, include_extras=True).items()
        if hasattr(hint, "__metadata__")
    }
    for name, text in shown.items():
        if name in LlmArgs.model_fields and isinstance(text, str) and (text.isdigit() or text == "auto"):
            assert str(LlmArgs.model_fields[name].default) == text, name
    assert shown["max_batch_size"] == f"{LlmArgs.model_fields['max_batch_size'].default}; run, chat: 1"


def test_sampling_options_become_parameters() -> None:
    options = SamplingOptions(max_tokens=5, temperature=0.0, stop=["a", "b"], seed=7)
    assert options.sampling_parameters() == {"max_tokens": 5, "temperature": 0.0, "stop": ["a", "b"], "seed": 7}


def test_options_left_out_are_no_parameters() -> None:
    assert SamplingOptions().sampling_parameters() == {}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_wrong_sampling_options_are_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        SamplingOptions(**changes).sampling_parameters()
    assert caught.value.field == field
