"""`serve`: listens, says where, answers, and returns in good order when told to stop."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.server.live_server import LiveServer
from tokenmill.errors import InvalidParameterError
from tokenmill.server.run import open_listener, serve

SERVE = """
import sys
from tokenmill import LLM
from tokenmill.server import serve
with LLM(sys.argv[1], device="cpu", dtype="float32", num_threads=1) as llm:
    serve(llm, port=0, served_model_name="tiny", on_start=lambda url: print(url, flush=True), log_level="warning")
    print("returned", flush=True)
print("cleaned up", flush=True)
"""


SLOWLY = """
import time
from tokenmill.engine.core import EngineCore
from tokenmill.server import run
advance = EngineCore.advance
EngineCore.advance = lambda engine: (time.sleep(0.1), advance(engine))[1]
run._CTRL_C_SECONDS = 1
"""


@pytest.mark.spec("A6")
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_server_after_its_requests(model_dir: Path, signal_number: signal.Signals) -> None:
    """A stream under way when the signal comes is finished, then the caller's own clean-up runs."""
    with subprocess.Popen([sys.executable, "-c", SERVE, model_dir], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            body = {"prompt": "a", "max_tokens": 400, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal_number)
                assert list(lines)[-2] == "data: [DONE]"
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health")
            assert process.stdout.read().split("\n") == ["returned", "cleaned up", ""]
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("num_signals", [1, 2])
def test_ctrl_c_does_not_wait_long_for_requests(model_dir: Path, num_signals: int) -> None:
    """A stream that would go on for minutes gets seconds, and none after a second Ctrl-C."""
    command = [sys.executable, "-c", SLOWLY + SERVE, model_dir]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            body = {"prompt": "a", "max_tokens": 400, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
                lines = response.iter_lines()
                next(lines)
                for _ in range(num_signals):
                    process.send_signal(signal.SIGINT)
                    time.sleep(0.5)
                output, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert output.split("\n") == ["returned", "cleaned up", ""]
    assert process.returncode == 0
    assert "1 requests may finish within 1 s" in errors
    assert "Traceback" not in errors


def test_listener_has_no_delay() -> None:
    """asyncio switches Nagle's algorithm off only on sockets that name their protocol."""
    with open_listener("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
        assert listener.getsockname()[1] > 0


def test_port_in_use() -> None:
    with open_listener("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InvalidParameterError, match=f"port {port}") as caught:
            open_listener("127.0.0.1", port)
    assert caught.value.field == "port"


def test_host_that_does_not_exist() -> None:
    for host in ("no.such.host.invalid", "192.0.2.1"):  # the second is nobody's (RFC 5737)
        with pytest.raises(InvalidParameterError, match="Give an address of this machine") as caught:
            open_listener(host, 0)
        assert caught.value.field == "host"


def test_unknown_log_level(server: LiveServer) -> None:
    with pytest.raises(InvalidParameterError, match="'warning'") as caught:
        serve(server.llm, port=0, log_level="warnin")
    assert caught.value.field == "log_level"


@pytest.mark.parametrize("port", [-1, 65536, 70000])
def test_port_out_of_range(port: int) -> None:
    with pytest.raises(InvalidParameterError, match=str(port)) as caught:
        open_listener("127.0.0.1", port)
    assert caught.value.field == "port"
