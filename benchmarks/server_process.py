"""`tokenmill serve` in a process of its own, for scripts that treat it badly and watch it from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.result_file import ROOT

START_TIMEOUT = 300.0
STOP_TIMEOUT = 60.0


@dataclass(frozen=True)
class ServerProcess:
    """A running server.

    Args:
        url: without a path.
        process: `tokenmill serve`.
        log: what it writes.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, str]:
        """Status and body of a GET."""
        return self._send(urllib.request.Request(self.url + path), timeout)

    def post(self, path: str, body: Any, timeout: float = 60.0) -> tuple[int, str]:
        """Status and body of a POST of JSON."""
        data = json.dumps(body).encode()
        return self._send(urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}), timeout)

    def _send(self, request: urllib.request.Request, timeout: float) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels, e.g. `num_requests_running`; 0 if there is none."""
        total = 0.0
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                if sample.name == f"tokenmill:{name}":
                    total += sample.value
        return total

    def wait_until_idle(self, timeout: float = 30.0) -> bool:
        """Wait until no sequence runs or waits and no cache block is held; False if that does not happen in time."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            if all(self.metric(name) == 0.0 for name in names):
                return True
            time.sleep(0.1)
        return False


@contextmanager
def running_server(
    model: str | Path, options: Sequence[str], log: Path, temporary: Path | None = None
) -> Iterator[ServerProcess]:
    """Serve `model` while the context lasts; then send SIGINT and wait for the end.

    Args:
        options: of `tokenmill serve`, beside the port.
        log: a file to be written.
        temporary: the server's folder for temporary files.

    Raises:
        RuntimeError: the server does not start, or does not end.
    """
    command = [sys.executable, "-m", "tokenmill", "serve", str(model), "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "400"}
    if temporary is not None:
        environment["TMPDIR"] = str(temporary)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    try:
        yield ServerProcess(_wait_for_url(process, log), process, log)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> float:
    """End a server as Ctrl-C does; the seconds that it took. Twice is harmless.

    Raises:
        RuntimeError: it does not end; it is killed.
    """
    started = time.monotonic()
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise RuntimeError(f"the server did not end within {STOP_TIMEOUT:.0f} s of SIGINT") from None
    return time.monotonic() - started


def _wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        found = re.search(r"is served at (http://\S+)/v1", log.read_text(errors="replace"))
        if found:
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
