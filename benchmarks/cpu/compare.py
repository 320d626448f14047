"""tokenmill and llama.cpp on this machine's CPU, in turns, with the same model file.

    python -m benchmarks.cpu.compare --llama-python path/to/python
    python -m benchmarks.cpu.compare --model path/to/SmolLM2.gguf --rounds 3 --output /tmp/compare.json

Players: tokenmill's engine backend and its torch backend, and llama.cpp with the file as it is and converted to Q4_0,
its fastest format. Each turn is a fresh process that does every work once; players take turns, so that what else the
machine does hits all alike. The engine and llama.cpp's best format play every round, the others, which are slow, the
first two. Values are medians over the rounds, ratios are medians of the ratios within a round. Beside them stand what
memory and arithmetic of this machine gave in the same minutes, and the limits that follow. Starts from a built engine,
and with kernels that nobody has compiled yet, are measured apart. All of it takes four minutes.

llama.cpp comes from `llama-cpp-python`, built from source for this machine's processor:
`CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python`. `--llama-python` names the
interpreter that has it. Without one only tokenmill is measured. Writes `results/cpu_compare.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cpu.machine_limits import MachineLimits, measure_limits
from benchmarks.result_file import FOLDER, RESULTS, ROOT, Row, print_rows, write_result
from tokenmill.inspection import inspect_model

ENGINE, TORCH = "tokenmill engine", "tokenmill torch"
LLAMA, LLAMA_BEST = "llama.cpp, same file", "llama.cpp, Q4_0"
Rounds = Mapping[str, Sequence[Mapping[str, float]]]
"""By player, one result of every work a round."""
STARTS = "start of Python to first token"
NUM_STARTS = 3


@dataclass(frozen=True)
class Work:
    """One work.

    Args:
        key: its name in the players' results.
        name: for people.
        metric, unit: what is measured.
        goal: of tokenmill's engine.
        ratio_goal: of tokenmill's engine over llama.cpp's best; None: none.
        peers: others, measured on 2 cores of an AMD EPYC with SmolLM2-135M-Instruct.
    """

    key: str
    name: str
    metric: str
    unit: str
    goal: float
    ratio_goal: float | None
    peers: Mapping[str, float]


WORKS = (
    Work("decode", "1 stream, 128 in, 128 out", "output throughput", "tokens/s", 280, 2.2,
         {"vLLM CPU build": 39, "OpenVINO GenAI": 61, "transformers": 13}),
    Work("prefill", "prefill of 1024 tokens", "prompt throughput", "tokens/s", 2000, 3.0,
         {"vLLM CPU build": 1029, "OpenVINO GenAI": 1069, "transformers": 488}),
    Work("batch", "16 streams, 128 in, 128 out", "output throughput", "tokens/s", 750, 3.0,
         {"vLLM CPU build": 286, "OpenVINO GenAI": 350, "transformers": 84}),
    Work("start", STARTS, "time", "s", 4.0, None, {"vLLM CPU build": 126, "transformers": 9}),
)  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    options = parse_arguments()
    if os.getloadavg()[0] > 0.25 * options.threads:
        print(f"warning: this machine is busy (load {os.getloadavg()[0]:.1f})", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        commands = players(options, Path(folder))
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        limits: list[MachineLimits] = []
        starts = measure_starts(commands[ENGINE], Path(folder)) if ENGINE in commands else []
        for index in range(options.rounds):
            names = [name for name in commands if name in (ENGINE, LLAMA_BEST) or index < options.other_rounds]
            for name in names if index % 2 == 0 else reversed(names):
                rounds[name].append(play(commands[name], index))
                print(
                    f"round {index + 1} {name:22}", *(f"{k} {v:.4g}" for k, v in rounds[name][-1].items()), flush=True
                )
            limits.append(measure_limits(options.threads))
    model = inspect_model(options.model)
    rows = make_rows(rounds, MachineLimits.median(limits), model.checkpoint.num_bytes, model.num_parameters) + starts
    print_rows(rows)
    write_result(options.output, "cpu_compare", rows)
    print(f"written to {options.output}")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.compare", description="tokenmill and llama.cpp.")
    parser.add_argument("--model", default="smollm2:135m", help="the demo model's name or a GGUF file")
    parser.add_argument("--llama-python", type=Path, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--backends", nargs="+", default=["engine", "torch"], help="of tokenmill")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--other-rounds", type=int, default=2, help="of the torch backend and llama.cpp's same file")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_compare.json")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.other_rounds, options.threads) < 1:
        parser.error("counts must be at least 1")
    return options


def players(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The command of each player's turn, but for its seed."""
    from tokenmill.checkpoints.resolve import resolve_model

    path, threads = str(resolve_model(options.model)), ["--threads", str(options.threads)]
    commands = {}
    for backend in options.backends:
        command = [sys.executable, "-m", "benchmarks.cpu.play_tokenmill", path, "--backend", backend, *threads]
        commands[f"tokenmill {backend}"] = command
    if options.llama_python is not None:
        script = [str(options.llama_python), str(FOLDER / "cpu" / "play_llama_cpp.py")]
        converted = str(folder / "q4_0.gguf")
        subprocess.run([*script, "convert", path, converted, "q4_0"], check=True)
        commands[LLAMA] = [*script, "measure", path, *threads]
        commands[LLAMA_BEST] = [*script, "measure", converted, *threads]
    return commands


def play(command: Sequence[str], index: int = 0, **environment: str) -> dict[str, float]:
    """One turn, in a process with these variables besides its own."""
    variables = {**os.environ, **environment}
    seeded = [*command, "--seed", str(100 * index)]
    done = subprocess.run(seeded, stdout=subprocess.PIPE, check=True, cwd=ROOT, env=variables)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_starts(command: Sequence[str], folder: Path) -> list[Row]:
    """Times from the start of Python to the first token that no round has: on a machine that has never run the engine,
    and from an engine that was built before. Leaves the kernels compiled for the rounds."""
    python, module, script, path, *options = command
    fresh = play([*command, "--only-start"], TOKENMILL_CACHE=str(folder / "cache"))["start"]
    engine = str(folder / "engine")
    build = [python, module, "tokenmill", "build", path, "-o", engine]
    subprocess.run(build, stdout=subprocess.DEVNULL, check=True, cwd=ROOT)
    built = [python, module, script, engine, *options, "--only-start"]
    play(built)
    seconds = statistics.median(play(built)["start"] for _ in range(NUM_STARTS))
    return [
        Row(STARTS, f"time, {ENGINE}, from a built engine", round(seconds, 3), "s", 2.0),
        Row(STARTS, f"time, {ENGINE}, no kernel compiled yet", round(fresh, 3), "s"),
    ]


def make_rows(rounds: Rounds, machine: MachineLimits, num_bytes: int, num_parameters: int) -> list[Row]:
    """Values of every player, ratios to llama.cpp, and the machine; bytes and parameters are the model's."""
    rows = []
    for work in WORKS:
        values = {name: statistics.median(turn[work.key] for turn in turns) for name, turns in rounds.items()}
        others = {name: round(value, 3) for name, value in values.items() if name.startswith("llama")}
        for name, value in values.items():
            if name.startswith("llama"):
                continue
            metric = f"{work.metric}, {name}"
            if name != ENGINE:
                rows.append(Row(work.name, metric, round(value, 3), work.unit))
                continue
            limit = limit_of(work, machine, num_bytes, num_parameters)
            peers = {**others, **work.peers}
            is_upper = work.key == "start"
            rows.append(Row(work.name, metric, round(value, 3), work.unit, work.goal, peers, limit, is_upper))
        rows += ratio_rows(work, rounds)
    rows += [
        Row("this machine", "memory read bandwidth", round(machine.bandwidth / 1e9, 1), "GB/s"),
        Row("this machine", "8-bit integer arithmetic", round(machine.int8_ops / 1e9, 1), "Gop/s"),
    ]
    return rows


def ratio_rows(work: Work, rounds: Rounds) -> list[Row]:
    """How many times as fast as llama.cpp, and as the torch backend, the engine is."""
    rows = []
    for other, goal in ((LLAMA, None), (LLAMA_BEST, work.ratio_goal), (TORCH, None)):
        if other not in rounds or ENGINE not in rounds or work.key == "start":
            continue
        pairs = zip(rounds[ENGINE], rounds[other], strict=False)  # others play the first rounds only
        ratio = statistics.median(own[work.key] / theirs[work.key] for own, theirs in pairs)
        rows.append(Row(work.name, f"{ENGINE} over {other}", round(ratio, 2), "", goal, is_upper_goal=False))
    return rows


def limit_of(work: Work, machine: MachineLimits, num_bytes: int, num_parameters: int) -> float | None:
    """Tokens a second if nothing but reading weights once a step, or multiplying them in 8 bits, took time."""
    if work.key == "start":
        return None
    if work.key == "prefill":
        return round(machine.int8_ops / (2 * num_parameters), 1)
    if work.key == "decode":
        return round(machine.bandwidth / num_bytes, 1)
    prefill = 128 * 2 * num_parameters / machine.int8_ops
    decode = 128 * max(num_bytes / machine.bandwidth / 16, 2 * num_parameters / machine.int8_ops)
    return round(128 / (prefill + decode), 1)


if __name__ == "__main__":
    main()
