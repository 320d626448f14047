"""`tokenmill run` on a tiny model: the answer alone on stdout, whatever is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Program
from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.cli.run import _model_and_prompt
from tokenmill.env import read_environment
from tokenmill.errors import ModelNotFoundError, UserError

GREEDY = ("--temperature", "0", "--max-tokens", "12", "--dtype", "float32", "--kv-cache-tokens", "1024")


@pytest.mark.spec("A3")
def test_the_answer_alone_goes_to_stdout(process: Program, tiny_model: Path) -> None:
    done = process("run", str(tiny_model), "Why is the sky blue?", *GREEDY)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.endswith("\n")
    assert len(done.stdout) > 1


def test_the_answer_is_that_of_the_python_api(program: Program, tiny_model: Path) -> None:
    from tokenmill import LLM, SamplingParams

    with LLM(str(tiny_model), dtype="float32", kv_cache_config={"max_tokens": 1024}) as llm:
        params = SamplingParams(max_tokens=12, temperature=0.0)
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße?"}]
        chatted = llm.chat(messages, params).outputs[0].text
        continued = llm.generate("Grüße?", params).outputs[0].text
    assert chatted != continued
    assert program("run", str(tiny_model), "Grüße?", "--system", "Be brief.", *GREEDY).stdout == chatted + "\n"
    assert program("run", "-m", str(tiny_model), "--raw", "Grüße?", *GREEDY).stdout == continued + "\n"
    assert program("run", str(tiny_model), "-", "--raw", *GREEDY, stdin="Grüße?").stdout == continued + "\n"


def test_sampling_with_a_seed_repeats(program: Program, tiny_model: Path) -> None:
    arguments = ["run", str(tiny_model), "hi", "--temperature", "1.5", "--max-tokens", "20", "--dtype", "float32"]
    first, again, other = (program(*arguments, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_a_model_without_chat_template_continues_and_refuses_a_role(program: Program, base_model: Path) -> None:
    assert program("run", str(base_model), "Once", *GREEDY).returncode == 0
    refused = program("run", str(base_model), "Once", "--system", "Be brief.", *GREEDY)
    assert refused.returncode == 2
    assert "has no chat template" not in refused.stdout
    assert "--system needs a chat template" in refused.stderr


def test_an_answer_ends_where_the_context_does(program: Program, base_model: Path) -> None:
    done = program("run", str(base_model), "Once upon a time", "--temperature", "0", "--dtype", "float32")
    assert done.returncode == 0


def test_a_prompt_longer_than_the_context_is_one_line(program: Program, base_model: Path) -> None:
    done = program("run", str(base_model), "far too long " * 20, *GREEDY)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: The prompt has 260 tokens; the context has room for 64")
    assert len(done.stderr.splitlines()) == 1


def test_a_damaged_model_is_one_line(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = program("run", str(broken), "hi", *GREEDY)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_configuration_file_is_used(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"model": str(tiny_model), "dtype": "float32", "max_seq_len": 8}))
    done = program("run", "much too long for eight", "--config", str(config))
    assert done.returncode == 2
    assert "has room for 8" in done.stderr


@pytest.mark.real_model
@pytest.mark.spec("H1")
def test_the_demo_model_answers_after_one_command(process: Program, program_environment: dict[str, str]) -> None:
    try:
        model = resolve_model("smollm2:135m")
    except ModelNotFoundError as error:
        pytest.skip(f"the demo model cannot be fetched: {error}")
    cache = Path(program_environment["TOKENMILL_CACHE"]) / "models"
    if not cache.exists():
        cache.symlink_to(read_environment().cache_dir / "models")
    done = process("run", "What is the capital of France? Answer in one word.", "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    named = process("run", str(model), "What is the capital of France? Answer in one word.", "--max-tokens", "8")
    assert named.stdout == done.stdout


def test_arguments_are_split_into_model_and_prompt(tiny_model: Path) -> None:
    assert _model_and_prompt(["hello"], None) == (None, "hello")
    assert _model_and_prompt(["hello"], "some/model") == ("some/model", "hello")
    assert _model_and_prompt(["some/model", "hello"], None) == ("some/model", "hello")
    assert _model_and_prompt(["x" * 5000], None) == (None, "x" * 5000)
    for words, model in [
        (["a", "b", "c"], None),
        (["a", "b"], "m"),
        ([str(tiny_model)], None),
        (["smollm2:135m"], None),
    ]:
        with pytest.raises(UserError):
            _model_and_prompt(words, model)
