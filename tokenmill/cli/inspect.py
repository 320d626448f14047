"""`tokenmill inspect`: what a model is and what memory it takes, without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from tokenmill.cli.command import command, examples
from tokenmill.cli.console import progress, readable_size, stdout_console
from tokenmill.cli.inspect_engine import EngineView, print_engine
from tokenmill.cli.memory_table import print_memory
from tokenmill.cli.options import ModelOptions
from tokenmill.errors import InvalidParameterError
from tokenmill.program.engine_config import is_engine

if TYPE_CHECKING:
    from tokenmill.inspection import CheckpointReport, ModelReport

_ENGINE_PANEL = "Built engines"

_Profile = Annotated[
    bool, typer.Option("--profile", help="Measure the operations on this machine.", rich_help_panel=_ENGINE_PANEL)
]
_Picture = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Draw the network to an HTML page; with --profile, its times.",
        rich_help_panel=_ENGINE_PANEL,
    ),
]

_EPILOG = examples(
    ("The demo model on this machine", "tokenmill inspect smollm2:135m"),
    (
        "Would 32 conversations of 4,096 tokens fit?",
        "tokenmill inspect Qwen/Qwen3-0.6B --max-batch-size 32 --max-seq-len 4096 --kv-cache-tokens 131072",
    ),
    (
        "Memory on a GPU that is not here, from config.json alone",
        "tokenmill inspect path/to/folder --load-format dummy --device cuda --quantization fp8",
    ),
    ("What multiplies its matrices on a GPU", "tokenmill inspect Qwen/Qwen3-0.6B --kernels --quantization fp8"),
    ("The operations of a built engine", "tokenmill inspect engines/smollm2 --step-tokens 16"),
    ("Where its time goes, as a table and a page", "tokenmill inspect engines/smollm2 --profile --picture times.html"),
    ("For a program", "tokenmill inspect path/to/model.gguf --json"),
)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "inspect", epilog=_EPILOG)(inspect)


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model to look at.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="List what multiplies each linear layer on a GPU, by numbers of rows.")
    ] = False,
    step_tokens: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Tokens of the step that costs are for.", rich_help_panel=_ENGINE_PANEL),
    ] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Cached tokens at the end of it.",
            show_default="512",
            rich_help_panel=_ENGINE_PANEL,
        ),
    ] = None,
    every_layer: Annotated[
        bool,
        typer.Option("--every-layer", help="A line for each operation of each layer.", rich_help_panel=_ENGINE_PANEL),
    ] = False,
    profile: _Profile = False,
    picture: _Picture = None,
    model_options: ModelOptions,
) -> None:
    """Say what a model is and how much memory it takes. No weight is loaded.

    The memory plan is the one that is made at start, for the backend that would run the model and the free memory of
    this machine. Of an engine that tokenmill build wrote, the operations are listed, too, with the bytes that each
    moves, what it computes in a step, and with --profile what it takes.
    """
    view = EngineView(step_tokens, context, every_layer, as_json, profile, picture)
    _check_options(model, view, kernels)
    arguments = model_options.llm_arguments(model)
    if is_engine(Path(model)):
        print_engine(Path(model), view, arguments)
        return
    with progress("Starting"):
        from tokenmill.inspection import inspect_model
    report = inspect_model(**arguments)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    console = stdout_console()
    console.print(_model_table(report))
    print_memory(report)
    if kernels:
        console.print(_kernel_table(report))


def _check_options(model: str, view: EngineView, kernels: bool) -> None:
    """Refuse what only engines have of a model, and what only models have of an engine."""
    if is_engine(Path(model)):
        if kernels:
            raise InvalidParameterError(
                f"{model} is a built engine, which has its kernels already.",
                field="kernels",
                remedy="Leave --kernels out, or give the checkpoint.",
            )
        return
    of_engines = {
        "profile": view.profile,
        "picture": view.picture is not None,
        "step_tokens": view.num_tokens != 1,
        "context": view.context_len is not None,
        "every_layer": view.every_layer,
    }
    for field, is_given in of_engines.items():
        if is_given:
            raise InvalidParameterError(
                f"{model} is no built engine.",
                field=field,
                remedy="Build one first: tokenmill build MODEL -o DIRECTORY.",
            )


def _model_table(report: ModelReport) -> Table:
    config, checkpoint = report.config, report.checkpoint
    table = Table(title=report.model, title_justify="left", title_style="bold", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value))

    row("Architecture", f"{config.architecture} ({config.model_type})")
    row("Parameters", f"{report.num_parameters:,}")
    row("Layers", f"{config.num_layers}{_windows(report)}")
    row("Hidden size", f"{config.hidden_size:,} (MLP {config.intermediate_size:,}, {config.hidden_act})")
    row(
        "Attention heads",
        f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, of {config.head_dim}",
    )
    row("Context", f"{config.max_position_embeddings:,} tokens")
    tied = ", tied to the output head" if config.tie_word_embeddings else ""
    row("Vocabulary", f"{config.vocab_size:,} tokens{tied}")
    row("Checkpoint", _checkpoint(checkpoint))
    row("Quantization", checkpoint.quantization)
    if report.tokenizer is None:
        row("Tokenizer", "none")
    else:
        row("Chat template", "yes" if report.tokenizer.has_chat_template else "no")
        ends = ", ".join(f"{text!r} ({token_id})" for token_id, text in report.tokenizer.end_tokens)
        row("End tokens", ends or "none")
    row("Backend", _backend(report))
    if report.backend == "torch":
        others = [name for name in report.attn_backends if name != report.attn_backend]
        row("Attention backend", report.attn_backend + (f" (there are also: {', '.join(others)})" if others else ""))
    row("Files", checkpoint.path)
    return table


def _checkpoint(checkpoint: CheckpointReport) -> str:
    if not checkpoint.num_tensors:
        return "config.json alone was read"
    return f"{checkpoint.format}, {readable_size(checkpoint.num_bytes)} in {checkpoint.num_tensors} tensors"


def _backend(report: ModelReport) -> str:
    if report.backend == "engine":
        return "engine: the model is compiled to a program"
    return "torch" if report.backend_reason is None else f"torch, not engine: {report.backend_reason}"


def _windows(report: ModelReport) -> str:
    sliding = sum(kind == "sliding_attention" for kind in report.config.layer_types)
    return f" ({sliding} of them see a window of {report.config.sliding_window:,} tokens)" if sliding else ""


def _kernel_table(report: ModelReport) -> Table:
    """What multiplies on an NVIDIA GPU; known without having one."""
    table = Table(
        title="Linear layers on an NVIDIA GPU",
        caption=_measured_where(report),
        title_justify="left",
        caption_justify="left",
        title_style="bold",
    )
    for heading in ("Layers, weight", "Rows", "Kernel"):
        table.add_column(heading, justify="right" if heading == "Rows" else "left", no_wrap=True)
    table.add_column("Tile, time if measured", overflow="fold")
    before = None
    for one in report.linear_kernels:
        is_new = one.layer != before
        if is_new and before is not None:
            table.add_section()
        before = one.layer
        layer = f"{one.count} {one.layer}\n{one.out_features:,} x {one.in_features:,}, {one.weights}" if is_new else ""
        table.add_row(layer, _rows(one.first_rows, one.last_rows), one.kernel, one.plan)
        for known in one.measured:
            of_torch = f"{known.torch_microseconds:,.1f}"
            cells = "  torch's", f"{of_torch} us"
            if known.algorithm is not None:
                cells = "  cuBLASLt", f"{known.algorithm}\n{known.microseconds:,.1f} us (torch's: {of_torch})"
            table.add_row("", _rows(known.first_rows, known.last_rows), *cells)
    return table


def _measured_where(report: ModelReport) -> str | None:
    """What `cuBLAS` stands for."""
    if all(one.kernel != "cuBLAS" for one in report.linear_kernels):
        return None
    where = report.measured_on
    if not any(one.measured for one in report.linear_kernels):
        of_device = f" on {where.device}" if where else ""
        return (
            f"cuBLAS: the fastest of its algorithms for each number of rows, measured when an engine starts on the "
            f"device. For this model nothing is measured yet{of_device}."
        )
    assert where is not None
    return (
        f"cuBLAS: torch's choice for numbers of rows that are not listed. Times of one product with the largest number "
        f"of rows, measured when an engine started on {where.device} ({where.versions})."
    )


def _rows(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"
