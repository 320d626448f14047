"""`tokenmill chat` on a tiny model, from a pipe and on a terminal, where Ctrl-C stops an answer and not the program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Program
from tests.cli.terminal import Terminal

ENGINE = ("--dtype", "float32", "--num-threads", "1", "--kv-cache-tokens", "16384")
GREEDY = ("--temperature", "0", "--max-tokens", "10", *ENGINE)
CTRL_D = "\x04"


@pytest.mark.spec("A3")
def test_piped_lines_are_answered_in_turn(program: Program, tiny_model: Path) -> None:
    from tokenmill import LLM, SamplingParams

    with LLM(str(tiny_model), dtype="float32", kv_cache_config={"max_tokens": 16384}) as llm:
        params = SamplingParams(max_tokens=10, temperature=0.0)
        messages = [{"role": "user", "content": "hello"}]
        first = llm.chat(messages, params).outputs[0].text
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "two\nlines"}]
        second = llm.chat(messages, params).outputs[0].text
    done = program("chat", str(tiny_model), *GREEDY, stdin="hello\n\ntwo\\\nlines\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{first}\n{second}\n"


def test_slash_commands_change_the_conversation(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    lines = [
        "/help", "/system Be brief.", "one", "two", "/undo", "three", "/retry", "/stats", "/save chat.json",
        "/clear", "/save empty.json", "/load chat.json", "//four", "/save more.json", "/exit", "never asked",
    ]  # fmt: skip
    done = program("chat", str(tiny_model), *GREEDY, stdin="\n".join(lines))
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "chat.json").read_text("utf-8"))
    assert [message["role"] for message in saved] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in saved if message["role"] == "user"] == ["one", "three"]
    assert json.loads((tmp_path / "empty.json").read_text("utf-8")) == saved[:1]
    more = json.loads((tmp_path / "more.json").read_text("utf-8"))
    assert more[:5] == saved
    assert more[5]["content"] == "/four"
    for text in ("/retry", "/params [NAME=VALUE ...]", "Taken back: two", "tokens/s", "KV cache:", "Saved 2 turns"):
        assert text in done.stderr, text
    assert "never asked" not in done.stdout + done.stderr


def test_a_loaded_conversation_goes_on(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    asked = program("chat", str(tiny_model), *GREEDY, stdin="one\ntwo\n").stdout
    program("chat", str(tiny_model), *GREEDY, stdin="one\n/save chat.json\n")
    went_on = program("chat", str(tiny_model), *GREEDY, "--load", "chat.json", stdin="two\n").stdout
    assert asked.endswith(went_on)


def test_params_are_set_shown_and_checked(program: Program, tiny_model: Path) -> None:
    lines = ["/params top_k=3 stop='[\"x y\"]'", "/params top_k=none temperature=none", "/params"]
    done = program("chat", str(tiny_model), *GREEDY, stdin="\n".join(lines))
    assert done.returncode == 0, done.stderr
    notes = done.stderr.splitlines()
    assert "top_k=3" in notes[0] and "stop=['x y']" in notes[0]
    assert "top_k" not in notes[1] and "greedy" in notes[1]
    assert notes[2] == notes[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/savee x", "Did you mean 'save'"),
        ("/params temperature", "is no assignment"),
        ("/params temprature=1", "Did you mean 'temperature'"),
        ("/params temperature=-1", "temperature"),
        ("/params temperature=hot", "temperature"),
        ("/params stop='x", "Close the quotation mark"),
        ("/load none.json", "Cannot read none.json"),
        ("/load", "/load takes one file"),
        ("/save a b", "/save takes one file"),
    ],
)
def test_wrong_slash_commands_are_one_line(
    program: Program, base_model: Path, tiny_model: Path, line: str, message: str
) -> None:
    done = program("chat", str(tiny_model), *GREEDY, stdin=f"{line}\nnever asked\n")
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_model_without_chat_template_is_refused(program: Program, base_model: Path) -> None:
    done = program("chat", str(base_model), *ENGINE)
    assert done.returncode == 2
    assert "has no chat template" in done.stderr
    assert "run --raw" in done.stderr


def test_a_full_context_forgets_the_oldest_turns_and_says_so(
    program: Program, tiny_model: Path, tmp_path: Path
) -> None:
    lines = [f"question {index} {'x' * 40}" for index in range(6)]
    done = program(
        "chat", str(tiny_model), "--temperature", "0", "--max-tokens", "8", "--max-seq-len", "256", *ENGINE,
        stdin="\n".join([*lines, "/save chat.json"]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "The context of 256 tokens is full: the oldest turn was forgotten." in done.stderr
    kept = [m["content"] for m in json.loads((tmp_path / "chat.json").read_text("utf-8")) if m["role"] == "user"]
    assert kept == lines[-len(kept) :]
    assert 0 < len(kept) < 6


def test_a_question_longer_than_the_context_is_one_line(program: Program, tiny_model: Path) -> None:
    done = program("chat", str(tiny_model), "--max-seq-len", "64", *ENGINE, stdin="x" * 100 + "\n")
    assert done.returncode == 2
    assert "The question has" in done.stderr


@pytest.mark.spec("A3")
def test_ctrl_c_stops_the_answer_and_not_the_program(
    tiny_model: Path, slow_environment: dict[str, str], tmp_path: Path
) -> None:
    """The answer would go on for thousands of tokens. Ctrl-C ends it, what was said is kept, the next one works."""
    saved = tmp_path / "chat.json"
    arguments = ["chat", str(tiny_model), "--temperature", "0", "--max-tokens", "6000", *ENGINE]
    with Terminal(arguments, slow_environment) as terminal:
        terminal.wait_for("> ")
        terminal.type("a long one\r")
        terminal.wait_for("a long one")
        terminal.wait_for_answer(200)
        terminal.interrupt()
        terminal.wait_for("Stopped.")
        terminal.wait_for("> ")
        terminal.type("/stats\r")
        assert "interrupted" in terminal.wait_for("KV cache: ")
        terminal.wait_for("> ")
        terminal.type("/params max_tokens=5\r")
        terminal.wait_for("max_tokens=5")
        terminal.wait_for("> ")
        terminal.type("a short one\r")
        terminal.wait_for("a short one")
        terminal.wait_for("> ")
        terminal.type(f"/save {saved}\r")
        terminal.wait_for("Saved 2 turns")
        terminal.wait_for("> ")
        terminal.type(CTRL_D)
        assert terminal.exit_code() == 0
    messages = json.loads(saved.read_text("utf-8"))
    assert [message["content"] for message in messages if message["role"] == "user"] == ["a long one", "a short one"]
    assert 10 < len(messages[1]["content"]) < 6000


def test_ctrl_c_throws_a_typed_line_away_and_leaves_on_an_empty_one(
    tiny_model: Path, program_environment: dict[str, str]
) -> None:
    with Terminal(["chat", str(tiny_model), *GREEDY], program_environment) as terminal:
        terminal.wait_for("> ")
        terminal.type("half a ques")
        terminal.wait_for("half a ques")
        terminal.interrupt()
        terminal.wait_for("> ")
        terminal.type("two\\\rlines")
        terminal.wait_for("lines")
        terminal.interrupt()
        terminal.wait_for("> ")
        terminal.interrupt()
        assert terminal.exit_code() == 0
        assert "Traceback" not in terminal.shown


def test_typed_lines_are_remembered_for_the_next_time(
    tiny_model: Path, program_environment: dict[str, str], tmp_path: Path
) -> None:
    environment = {**program_environment, "TOKENMILL_CACHE": str(tmp_path / "cache")}
    for keys in ("/system first line\r", "\x1b[A\x1b[A\r"):  # the second time: cursor up, past /exit
        with Terminal(["chat", str(tiny_model), *GREEDY], environment) as terminal:
            terminal.wait_for("> ")
            terminal.type(keys)
            terminal.wait_for("System message: first line")
            terminal.wait_for("> ")
            terminal.type("/exit\r")
            assert terminal.exit_code() == 0
    history = tmp_path / "cache" / "chat_history"
    assert history.read_text("utf-8").splitlines()[-3:] == ["/exit", "/system first line", "/exit"]
    assert history.stat().st_mode & 0o077 == 0


def test_ctrl_c_ends_run_quietly(tiny_model: Path, slow_environment: dict[str, str]) -> None:
    with Terminal(["run", str(tiny_model), "go on", "--max-tokens", "6000", *ENGINE], slow_environment) as terminal:
        terminal.wait_for_answer(100)
        terminal.interrupt()
        assert terminal.exit_code() == 130
        assert "Traceback" not in terminal.shown
        assert "interrupted" in terminal.shown
