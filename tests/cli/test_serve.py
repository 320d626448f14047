"""`tokenmill serve` announces itself, answers, and stops on Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.cli.conftest import Program


@pytest.mark.spec("A6")
def test_the_server_announces_itself_answers_and_stops(tiny_model: Path, program_environment: dict[str, str]) -> None:
    arguments = [
        "serve", str(tiny_model), "--port", "0", "--served-model-name", "tiny", "--api-key", "secret",
        "--dtype", "float32", "--kv-cache-tokens", "1024",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenmill", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**program_environment, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        announced = [process.stdout.readline() for _ in range(4)]
        assert announced[0].startswith("tiny is served at http://127.0.0.1:"), announced
        address = announced[0].split()[4]
        assert f"curl {address}/chat/completions -H 'Authorization: Bearer KEY'" in announced[1]
        assert announced[3].split() == ["metrics", address.removesuffix("/v1") + "/metrics"]
        request = urllib.request.Request(
            f"{address}/chat/completions",
            json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}).encode(),
            {"Content-Type": "application/json", "Authorization": "Bearer secret"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert answer["usage"]["completion_tokens"] == 4
    finally:
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in stderr


def test_a_port_in_use_is_one_line(program: Program, tiny_model: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = program("serve", str(tiny_model), "--port", port, "--dtype", "float32", "--kv-cache-tokens", "1024")
    assert done.returncode == 2
    assert "Cannot listen" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_log_level_is_refused(program: Program, tiny_model: Path) -> None:
    done = program("serve", str(tiny_model), "--log-level", "loud")
    assert done.returncode == 2
    assert "loud" in done.stderr
