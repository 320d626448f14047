"""`tokenmill bench throughput` and `tokenmill bench latency`: measured at the caller's end of the streaming API."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tokenmill.cli.command import EXIT_FAILURE, command, examples
from tokenmill.cli.console import print_error, print_note, stderr_console, stdout_console
from tokenmill.cli.loading import loaded_llm
from tokenmill.cli.option_kinds import number, word
from tokenmill.cli.options import DEFAULT_MODEL, ModelOptions
from tokenmill.errors import InvalidParameterError, UserError

if TYPE_CHECKING:
    from tokenmill.bench.report import BenchmarkReport
    from tokenmill.bench.workload import BenchmarkRequest
    from tokenmill.llm import LLM

_THROUGHPUT_EPILOG = examples(
    ("64 requests of 128 tokens, 128 tokens each", "tokenmill bench throughput"),
    ("Sixteen users at a time, bfloat16", "tokenmill bench throughput smollm2:135m --concurrency 16 --dtype bfloat16"),
    ("Two requests a second, at random times", "tokenmill bench throughput --request-rate 2 --num-requests 100"),
    ("Prompts of your own", "tokenmill bench throughput --dataset prompts.jsonl --report-json report.json"),
    ("Where the time goes, for ui.perfetto.dev", "tokenmill bench throughput --profile timeline.json"),
    ("Random weights of the model's shape", "tokenmill bench throughput path/to/model --load-format dummy"),
)
_LATENCY_EPILOG = examples(
    ("One stream, ten times", "tokenmill bench latency"),
    ("Prefill of a long prompt", "tokenmill bench latency --isl 1024 --osl 1"),
)
_WORKLOAD_PANEL = "Workload"
MAX_PROFILED_REQUESTS = 64
"""Requests of a profiled run."""
MAX_PROFILED_STEPS = 100_000
"""Steps that the engine keeps records of for a timeline."""

ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="The model to measure.", show_default=DEFAULT_MODEL)
]
NumIterations = Annotated[
    int, typer.Option("--num-iterations", "--num-requests", metavar="N", min=1, help="Requests, one after the other.")
]
NumRequests = Annotated[
    int | None, number("Requests to send.", panel=_WORKLOAD_PANEL, default="64, or the data set's lines")
]
Concurrency = Annotated[
    int | None, number("Most requests under way at once.", panel=_WORKLOAD_PANEL, default="no limit")
]
RequestRate = Annotated[
    float | None,
    word("R", "Requests a second, arriving at random (Poisson).", panel=_WORKLOAD_PANEL, default="all at once"),
]


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """What is sent, and where the report goes."""

    input_len: Annotated[
        int,
        typer.Option(
            "--input-len", "--isl", metavar="N", min=1, help="Tokens of a prompt.", rich_help_panel=_WORKLOAD_PANEL
        ),
    ] = 128
    output_len: Annotated[
        int,
        typer.Option(
            "--output-len", "--osl", metavar="N", min=1, help="Tokens of an answer.", rich_help_panel=_WORKLOAD_PANEL
        ),
    ] = 128
    dataset: Annotated[
        Path | None,
        word(
            "FILE.jsonl",
            'Lines such as {"prompt": "...", "output_tokens": 64}, or "input_ids".',
            panel=_WORKLOAD_PANEL,
        ),
    ] = None
    warmup: Annotated[int, number("Requests sent before, not measured.", panel=_WORKLOAD_PANEL, at_least=0)] = 2
    seed: Annotated[int, number("Of the random prompts and arrivals.", panel=_WORKLOAD_PANEL, at_least=0)] = 0
    prefix_cache: Annotated[
        bool | None,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Reuse of cached prefixes.",
            rich_help_panel=_WORKLOAD_PANEL,
            show_default="on for a data set, off for random prompts",
        ),
    ] = None
    report_json: Annotated[Path | None, word("FILE", "Write the report, with every request, as JSON.")] = None
    profile: Annotated[
        Path | None,
        word(
            "FILE",
            "Run a part of it again under a profiler: print a table of kernels, write a timeline for Perfetto.",
        ),
    ] = None


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    group = typer.Typer(no_args_is_help=True, help="Measure throughput and latency.", rich_markup_mode="rich")
    command(group, "throughput", epilog=_THROUGHPUT_EPILOG)(throughput)
    command(group, "latency", epilog=_LATENCY_EPILOG)(latency)
    app.add_typer(group, name="bench")


def throughput(
    model: ModelArgument = None,
    *,
    num_requests: NumRequests = None,
    concurrency: Concurrency = None,
    request_rate: RequestRate = None,
    workload: WorkloadOptions,
    model_options: ModelOptions,
) -> None:
    """Many requests at a time: how much work gets done, and how long each request takes.

    Prompts are random tokens unless there is a data set; decoding is greedy and goes on after end tokens. All
    counts are of tokens that came back.
    """
    from tokenmill.bench.workload import with_poisson_arrivals

    with_poisson_arrivals([], request_rate)  # refuse a bad rate before the model is loaded
    _measure("throughput", model, model_options, workload, num_requests, concurrency, request_rate)


def latency(
    model: ModelArgument = None,
    *,
    num_iterations: NumIterations = 10,
    workload: WorkloadOptions,
    model_options: ModelOptions,
) -> None:
    """One request after the other: how fast a single user is served."""
    _measure("latency", model, model_options, workload, num_iterations, 1, None)


def _measure(
    kind: str,
    model: str | None,
    model_options: ModelOptions,
    workload: WorkloadOptions,
    num_requests: int | None,
    concurrency: int | None,
    request_rate: float | None,
) -> None:
    from tokenmill.bench.profile import check_profiling
    from tokenmill.bench.run import run_benchmark
    from tokenmill.bench.workload import read_dataset, with_poisson_arrivals

    requests: list[BenchmarkRequest] | None = None
    if workload.dataset is not None:
        requests = read_dataset(workload.dataset, output_len=workload.output_len, num_requests=num_requests)
    _check_writable(workload.report_json, "report_json")
    _check_writable(workload.profile, "profile")
    reuses_prefixes = workload.prefix_cache if workload.prefix_cache is not None else requests is not None
    cache = {} if workload.prefix_cache is None and requests is not None else {"enable_block_reuse": reuses_prefixes}
    records = {} if workload.profile is None else {"iter_stats_max_iterations": MAX_PROFILED_STEPS}
    arguments = model_options.llm_arguments(model, kv_cache_config=cache, stats_config=records)
    with loaded_llm(arguments) as llm:
        if workload.profile is not None:
            check_profiling(llm)
        if requests is None:
            if workload.prefix_cache is None:
                print_note("The prefix cache is off for random prompts; --prefix-cache turns it on.")
            requests = _synthetic(llm, workload, num_requests or 64, workload.seed)
        warmup = _warmup(llm, workload, requests)
        requests = with_poisson_arrivals(requests, request_rate, seed=workload.seed)
        with _progress(kind, len(requests)) as bar:
            report = run_benchmark(
                llm,
                requests,
                kind=kind,
                warmup=warmup,
                concurrency=concurrency,
                workload=_described(workload, len(requests), concurrency, request_rate),
                command=shlex.join(["tokenmill", *sys.argv[1:]]),
                on_finished=None if bar is None else lambda: bar.advance(bar.task_ids[0]),
            )
        if workload.profile is not None:
            _profile(llm, requests, workload.profile, concurrency)
    _deliver(report, workload.report_json)


def _synthetic(llm: LLM, workload: WorkloadOptions, count: int, seed: int) -> list[BenchmarkRequest]:
    from tokenmill.bench.workload import synthetic_requests

    return synthetic_requests(
        num_requests=count,
        input_len=workload.input_len,
        output_len=workload.output_len,
        vocab_size=llm.description.model.vocab_size,
        special_token_ids=() if llm.tokenizer is None else llm.tokenizer.all_special_ids,
        seed=seed,
    )


def _warmup(llm: LLM, workload: WorkloadOptions, requests: list[BenchmarkRequest]) -> list[BenchmarkRequest]:
    """Requests like the measured ones that leave nothing in the prefix cache for them."""
    from tokenmill.bench.workload import BenchmarkRequest

    if not workload.warmup:
        return []
    if workload.dataset is None:
        return _synthetic(llm, workload, workload.warmup, workload.seed + 1)
    random_prompts = _synthetic(llm, workload, workload.warmup, workload.seed)
    output_len = requests[0].output_len
    return [BenchmarkRequest(request.prompt, output_len) for request in random_prompts]


def _described(
    workload: WorkloadOptions, num_requests: int, concurrency: int | None, request_rate: float | None
) -> dict[str, Any]:
    lengths: dict[str, Any] = {"input_len": workload.input_len, "output_len": workload.output_len}
    source = lengths if workload.dataset is None else {"dataset": str(workload.dataset)}
    return {
        **source,
        "num_requests": num_requests,
        "concurrency": concurrency,
        "request_rate": request_rate,
        "warmup": workload.warmup,
        "seed": workload.seed,
    }


def _progress(kind: str, total: int) -> AbstractContextManager[Progress | None]:
    console = stderr_console()
    if not console.is_terminal:
        return nullcontext()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True)
    bar.add_task(f"bench {kind}", total=total)
    return bar


def _profile(llm: LLM, requests: list[BenchmarkRequest], path: Path, concurrency: int | None) -> None:
    """Profile a part of the requests and print where their time went.

    Raises:
        UserError: the timeline cannot be written.
    """
    from tokenmill.bench.profile import run_profile

    try:
        profile = run_profile(llm, requests[:MAX_PROFILED_REQUESTS], path, concurrency=concurrency)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.", field="profile") from None
    profile.print(stdout_console())
    print_note(f"Timeline written to {path}: open it at https://ui.perfetto.dev.")


def _check_writable(path: Path | None, field: str) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise InvalidParameterError(
            f"There is no folder {path.absolute().parent}.", field=field, remedy="Create it first."
        )


def _deliver(report: BenchmarkReport, path: Path | None) -> None:
    """Print the report and write it.

    Raises:
        UserError: the file cannot be written.
        typer.Exit: a request failed.
    """
    report.print(stdout_console())
    if path is not None:
        try:
            path.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"Cannot write {path}: {error.strerror or error}.", field="report_json") from None
        print_note(f"Report written to {path}.")
    if report.failed:
        print_error(f"{len(report.failed)} of {len(report.records)} requests failed: {report.failed[0].error}")
        raise typer.Exit(EXIT_FAILURE)
