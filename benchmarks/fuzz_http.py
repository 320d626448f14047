"""Requests of every shape against a running server, and values of every kind against the Python API.

    python -m benchmarks.fuzz_http
    python -m benchmarks.fuzz_http --requests 500 --examples 50 --output /tmp/fuzz_http.json

schemathesis makes requests from the server's own OpenAPI document: valid ones, ones that break it in one place, wrong
methods and types. None may be answered with a 5xx or with anything that the document does not describe; what breaks the
schema has to be refused, what satisfies it may be refused only for a true reason (`fuzz_checks.py`). Then hypothesis
makes values for `SamplingParams` and `GenerationRequest` (`tests/fuzz`). Afterwards the server has to give the answer
that it gave before, with all its blocks free. Needs the extra `fuzz`. Writes `results/fuzz_http.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.result_file import FOLDER, RESULTS, ROOT, Row, print_rows, write_result
from benchmarks.server_process import ServerProcess, running_server
from tests.support.tiny_checkpoint import VOCAB_SIZE, write_tiny_model

MAX_POSITIONS = 256
CASES_PER_OPERATION = 250
"""Of one run of schemathesis; runs with other seeds follow until there are enough requests."""
SERVER_OPTIONS = (
    "--served-model-name", "tiny", "--device", "cpu", "--dtype", "float32", "--num-threads", "1",
    "--kv-cache-tokens", "4096", "--max-batch-size", "16",
)  # fmt: skip
KNOWN_BODY = {"prompt": "the quick brown", "max_tokens": 24, "temperature": 0, "ignore_eos": True}


@dataclass
class FuzzOutcome:
    """What happened.

    Args:
        statuses: answers of the server by HTTP status; 0 stands for no answer.
        failures: what schemathesis found wrong.
        problems: what was wrong with the server afterwards.
        num_properties: properties that hypothesis checked.
        failed_properties: those that did not hold.
        num_examples: values that each was checked with.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_properties: int = 0
    failed_properties: list[str] = field(default_factory=list)
    num_examples: int = 0

    @property
    def num_requests(self) -> int:
        """Requests that were sent."""
        return self.statuses.total()

    def rows(self, num_wanted: int) -> list[Row]:
        """The outcome in numbers."""
        http, python = "requests made from the OpenAPI document", "values made by hypothesis"
        num_timeouts = self.statuses[503] + self.statuses[504]  # any other 503 is a violation
        num_errors = sum(count for status, count in self.statuses.items() if status >= 500 or not status) - num_timeouts
        rows = [
            Row(http, "requests", self.num_requests, "requests", num_wanted, is_upper_goal=False),
            Row(http, "answered 2xx", self.statuses[200], "requests"),
            Row(http, "refused 4xx", sum(self.statuses[status] for status in range(400, 500)), "requests"),
            Row(http, "answered 503 or 504, for a timeout of its own", num_timeouts, "requests"),
            Row(http, "answered 5xx else, or not at all", num_errors, "requests", 0),
            Row(http, "violations of the document", len(self.failures), "violations", 0),
            Row("the server afterwards", "problems", len(self.problems), "problems", 0),
        ]
        if self.num_examples:
            rows += [
                Row(python, "properties", self.num_properties, "properties", 1, is_upper_goal=False),
                Row(python, "values for each", self.num_examples, "values"),
                Row(python, "properties that do not hold", len(self.failed_properties), "properties", 0),
            ]
        return rows


def main() -> None:
    """Fuzz, print, write; fails if anything was found."""
    options = parse_arguments()
    outcome = FuzzOutcome()
    fuzz_server(outcome, num_requests=options.requests, seed=options.seed, server_options=options.serve)
    if options.examples:
        fuzz_python(outcome, options.examples)
    rows = outcome.rows(options.requests)
    print_rows(rows)
    for finding in (*outcome.failures, *outcome.problems, *outcome.failed_properties):
        print(f"\n{finding}")
    write_result(options.output, "fuzz_http", rows)
    print(f"written to {options.output}")
    if not all(row.is_reached for row in rows):
        raise SystemExit(1)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz_http", description="Fuzz the HTTP server.")
    parser.add_argument("--requests", type=int, default=5000, help="send at least this many")
    parser.add_argument("--examples", type=int, default=1000, help="values for each property in Python; 0: none")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", action="append", default=[], metavar="OPTION", help="another option of the server")
    parser.add_argument("--output", type=Path, default=RESULTS / "fuzz_http.json")
    return parser.parse_args(arguments)


# ---- over HTTP -------------------------------------------------------------------------------------------------------


def fuzz_server(outcome: FuzzOutcome, *, num_requests: int, seed: int = 1, server_options: Iterable[str] = ()) -> None:
    """Send at least `num_requests` to a server of its own on a tiny model, then look at the server.

    Args:
        outcome: is added to.
        seed: of the first run of schemathesis.
        server_options: besides the usual ones.
    """
    with tempfile.TemporaryDirectory(prefix="tokenmill-fuzz-") as name:
        folder = Path(name)
        model = write_tiny_model(folder / "model", max_positions=MAX_POSITIONS)
        with running_server(model, [*SERVER_OPTIONS, *server_options], folder / "server.log") as server:
            expected = known_answer(server)
            cases = min(CASES_PER_OPERATION, max(10, num_requests // 12))
            while outcome.num_requests < num_requests and len(outcome.failures) < 20:
                before = outcome.num_requests
                run_schemathesis(outcome, server.url, folder / f"report-{seed}", seed=seed, num_cases=cases)
                if outcome.num_requests == before:
                    outcome.problems.append("schemathesis sent nothing")
                    break
                seed += 1
            outcome.problems += problems_of(server, expected)


def known_answer(server: ServerProcess) -> Any:
    """The choices of a fixed greedy request, the same whenever it is asked."""
    status, body = server.post("/v1/completions", KNOWN_BODY)
    return json.loads(body)["choices"] if status == 200 else f"status {status}: {body}"


def problems_of(server: ServerProcess, expected: Any) -> list[str]:
    """What is wrong with a server that should be idle and well."""
    problems = []
    if server.process.poll() is not None:
        return [f"the server has ended with {server.process.returncode}: {server.log.read_text()[-2000:]}"]
    if not server.wait_until_idle():
        problems.append("requests still run, or blocks are still held")
    status, body = server.get("/health")
    if status != 200:
        problems.append(f"/health is {status}: {body}")
    answer = known_answer(server)
    if isinstance(expected, str) or answer != expected:
        problems.append(f"the known request was answered with {answer}, before with {expected}")
    if "Traceback" in server.log.read_text(errors="replace"):
        problems.append(f"the server logged a traceback: {server.log.read_text(errors='replace')[-3000:]}")
    return problems


def run_schemathesis(outcome: FuzzOutcome, url: str, folder: Path, *, seed: int, num_cases: int) -> None:
    """One run of schemathesis; answers and findings go to `outcome`, its report to `folder`."""
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--max-examples", str(num_cases),
        "--seed", str(seed), "--exclude-checks", "positive_data_acceptance,not_a_server_error", "--continue-on-failure",
        "--generation-database", "none", "--request-timeout", "60", "--output-sanitize", "false", "--no-color",
        "--report", "json,ndjson", "--report-json-path", str(folder / "report.json"),
        "--report-ndjson-path", str(folder / "events.ndjson"),
    ]  # fmt: skip
    folder.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(FOLDER), str(ROOT), os.environ.get("PYTHONPATH")))),
        "SCHEMATHESIS_HOOKS": "fuzz_checks",
        "FUZZ_VOCAB_SIZE": str(VOCAB_SIZE),
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if not (folder / "report.json").is_file():
        outcome.problems.append(f"schemathesis failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return
    report = json.loads((folder / "report.json").read_text("utf-8"))
    outcome.statuses += read_statuses((folder / "events.ndjson").read_text("utf-8").splitlines())
    if report["failures"] or report["errors"]:
        sections = (done.stdout.partition(f"= {title} =")[2] for title in ("ERRORS", "FAILURES"))
        outcome.failures.append(f"seed {seed}:\n" + next(filter(None, sections), done.stdout)[:8000])
    elif done.returncode:
        outcome.problems.append(f"schemathesis ended with {done.returncode}: {done.stdout[-2000:]}")


def read_statuses(lines: Iterable[str]) -> Counter[int]:
    """HTTP statuses in the events that schemathesis reports; 0 for a request without an answer."""
    statuses: Counter[int] = Counter()
    for line in lines:
        recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
        for interaction in recorder.get("interactions", {}).values():
            statuses[(interaction["response"] or {}).get("status_code", 0)] += 1
    return statuses


# ---- in Python -------------------------------------------------------------------------------------------------------


def fuzz_python(outcome: FuzzOutcome, num_examples: int) -> None:
    """Run the properties in `tests/fuzz` that need no server, each with `num_examples` values."""
    command = [sys.executable, "-m", "pytest", "tests/fuzz", "-q", "--tb=short", "-m", "fuzz", "-k", "not http"]
    environment = {**os.environ, "FUZZ_EXAMPLES": str(num_examples), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--timeout", "3600"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    outcome.num_properties = sum(counts.values())
    outcome.num_examples = num_examples
    if done.returncode:
        outcome.failed_properties.append(done.stdout[-8000:])


if __name__ == "__main__":
    main()
