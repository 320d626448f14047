"""`tokenmill inspect ENGINE`: the operations of a built engine, with what each moves and computes in a step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from tokenmill.cli.build_summary import summary_table
from tokenmill.cli.console import print_note, progress, readable_size, stdout_console
from tokenmill.cli.memory_table import print_memory
from tokenmill.cli.profile_engine import operation_times
from tokenmill.errors import InvalidParameterError

if TYPE_CHECKING:
    from tokenmill.builder.engine import Engine
    from tokenmill.program.costs import Cost, OperationRow, StepSize


WIDE = 120
"""Columns of a terminal that has room for everything."""

USUAL_CONTEXT = 512
"""Cached tokens of the step that costs are for, unless another number is asked for."""


@dataclass(frozen=True, slots=True)
class EngineView:
    """What is shown of an engine.

    Args:
        num_tokens: of the step that costs are for.
        context_len: cached tokens at the end of it; None: 512, or as many as the engine has room for.
        every_layer: a line for each operation, not one for the same operations of all layers.
        as_json: plain data instead of tables.
        profile: whether the operations are run and measured.
        picture: a file that the network is drawn to.
    """

    num_tokens: int
    context_len: int | None
    every_layer: bool
    as_json: bool
    profile: bool
    picture: Path | None


def print_engine(path: Path, view: EngineView, arguments: dict[str, Any]) -> None:
    """The summary, the memory plan and the table of operations of the engine in a directory.

    Args:
        path: the directory.
        view: what is shown.
        arguments: of `LLM`, for the memory plan; `model` among them.

    Raises:
        EngineFileError: the engine is damaged, or for another machine.
        UserError: the engine cannot be started so, the step not be measured, or the picture not be written.
    """
    with progress("Starting"):
        from tokenmill.builder.engine import Engine
        from tokenmill.inspection import plan_engine
        from tokenmill.program.costs import StepSize, operation_rows, rows_by_layer_part
    engine = Engine.load(path)
    planned = plan_engine(engine, **arguments)
    cache_nbytes = {"float32": 4, "bfloat16": 2}.get(engine.config.kv_cache_dtype, 4)
    context_len = max(view.context_len or min(USUAL_CONTEXT, engine.config.limits.max_seq_len), view.num_tokens)
    step = StepSize(num_tokens=view.num_tokens, num_rows=1, context_len=context_len, cache_nbytes=cache_nbytes)
    times = None
    if view.profile:
        with progress("Measuring operations"):
            times = operation_times(engine, step)
    if view.picture is not None:
        _write_picture(engine, view.picture, step, times)
    rows = operation_rows(engine.program, step, times)
    if view.as_json:
        typer.echo(json.dumps({**planned.to_dict(), **_plain(engine, rows, step)}, indent=2))
        return
    console = stdout_console()
    console.print(summary_table(engine, str(path)))
    print_memory(planned)
    tokens = "1 token" if step.num_tokens == 1 else f"{step.num_tokens:,} tokens"
    title = f"A step of {tokens}, {step.context_len:,} cached at its end"
    shown = rows if view.every_layer else rows_by_layer_part(rows)
    console.print(_time_table(shown, title, console.width) if times else _operation_table(shown, title, console.width))
    if view.picture is not None:
        print_note(f"The network is drawn in {view.picture}.")


def _write_picture(engine: Engine, path: Path, step: StepSize, times: dict[str, float] | None) -> None:
    from tokenmill.builder.engine_picture import MeasuredStep, engine_picture

    page = engine_picture(engine, None if times is None else MeasuredStep(step, times))
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InvalidParameterError(f"{path} cannot be written: {error.strerror or error}.", field="picture") from None


def _plain(engine: Engine, rows: tuple[OperationRow, ...], step: StepSize) -> dict[str, Any]:
    config = engine.config
    return {
        "model": config.model.name,
        "tokenmill_version": config.tokenmill_version,
        "format_version": config.format_version,
        "device": config.target.device,
        "kernels": engine.kernels,
        "quantization": config.quantization,
        "dtype": config.dtype,
        "kv_cache_dtype": config.kv_cache_dtype,
        "stripped": config.stripped,
        "limits": {name: getattr(config.limits, name) for name in config.limits.__struct_fields__},
        "arena_bytes": engine.program.arena_bytes,
        "weight_bytes": engine.weight_nbytes,
        "report": config.report,
        "step": asdict(step),
        "operations": [
            {
                "name": row.name,
                "kind": row.kind,
                "shape": row.shape,
                "formats": row.formats,
                **asdict(row.cost),
                **({} if row.microseconds is None else {"microseconds": row.microseconds}),
            }
            for row in rows
        ],
    }


def _operation_table(rows: tuple[OperationRow, ...], title: str, width: int) -> Table:
    """A row for each; the narrow table of small terminals leaves out what names and weights say already."""
    table = Table(title=title, title_justify="left", title_style="bold")
    is_wide = width >= WIDE
    table.add_column("Operation", overflow="fold", min_width=26)
    for heading in ("Kind", "Output", "Weights", "Count", "Bytes", "Share", "Operations"):
        if is_wide or heading not in ("Kind", "Output", "Operations"):
            justify: JustifyMethod = "left" if heading in ("Kind", "Output", "Weights") else "right"
            table.add_column(heading, justify=justify, no_wrap=True)
    total = sum((row.cost for row in rows), start=type(rows[0].cost)())

    def add(name: str, kind: str, count: int, shape: str, formats: str, cost: Cost, style: str = "") -> None:
        share = f"{100 * cost.bytes / max(total.bytes, 1):.1f} %"
        cells = [name.removeprefix("model."), kind, shape, formats, str(count), readable_size(cost.bytes), share]
        cells = [*cells, _operations(cost.flops)] if is_wide else [cells[0], *cells[3:]]
        table.add_row(*(Text(cell) for cell in cells), style=style)

    for row in rows:
        add(row.name, row.kind, row.count, row.shape, row.formats, row.cost)
    add("Total", "", sum(row.count for row in rows), "", "", total, style="bold")
    return table


def _time_table(rows: tuple[OperationRow, ...], title: str, width: int) -> Table:
    """What operations take, and the rates at which they move and compute."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("Operation", overflow="fold", min_width=26)
    headings = ["Weights", "Count", "Bytes", "Time", "Share", "GB/s", "Gop/s"]
    for heading in headings if width >= WIDE else headings[2:]:
        table.add_column(heading, justify="left" if heading == "Weights" else "right", no_wrap=True)
    total_cost = sum((row.cost for row in rows), start=type(rows[0].cost)())
    total = sum(row.microseconds or 0.0 for row in rows)

    def add(name: str, formats: str, count: int, cost: Cost, microseconds: float, style: str = "") -> None:
        rates = [f"{amount / microseconds / 1e3:,.1f}" if microseconds else "" for amount in (cost.bytes, cost.flops)]
        share = f"{100 * microseconds / max(total, 1e-9):.1f} %"
        cells = [formats, str(count), readable_size(cost.bytes), _duration(microseconds), share, *rates]
        shown = cells if width >= WIDE else cells[2:]
        table.add_row(*(Text(cell) for cell in (name.removeprefix("model."), *shown)), style=style)

    for row in rows:
        add(row.name, row.formats, row.count, row.cost, row.microseconds or 0.0)
    add("Total", "", sum(row.count for row in rows), total_cost, total, style="bold")
    return table


def _duration(microseconds: float) -> str:
    return f"{microseconds / 1e3:,.2f} ms" if microseconds >= 1000 else f"{microseconds:.1f} us"


def _operations(number: int) -> str:
    """A number of operations in the unit that reads best."""
    for unit, factor in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:,.2f} {unit}"
    return str(number)
