"""`tokenmill inspect ENGINE`: the operations of a built engine, with what each moves and computes in a step."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from tokenmill.cli.build_summary import summary_table
from tokenmill.cli.console import progress, readable_size, stdout_console

if TYPE_CHECKING:
    from tokenmill.builder.engine import Engine
    from tokenmill.program.costs import Cost, OperationRow, StepSize


WIDE = 120
"""Columns of a terminal that has room for everything."""


def print_engine(path: Path, *, num_tokens: int, context_len: int, every_layer: bool, as_json: bool) -> None:
    """The summary and the table of operations.

    Args:
        path: the engine's directory.
        num_tokens: of the step that costs are for.
        context_len: cached tokens at the end of it.
        every_layer: a line for each operation, not one for the same operations of all layers.
        as_json: plain data instead.

    Raises:
        EngineFileError: the engine is damaged, or for another machine.
    """
    with progress("Starting"):
        from tokenmill.builder.engine import Engine
        from tokenmill.program.costs import StepSize, operation_rows, rows_by_layer_part
    engine = Engine.load(path)
    cache_nbytes = {"float32": 4, "bfloat16": 2}.get(engine.config.kv_cache_dtype, 4)
    step = StepSize(
        num_tokens=num_tokens, num_rows=1, context_len=max(context_len, num_tokens), cache_nbytes=cache_nbytes
    )
    rows = operation_rows(engine.program, step)
    if as_json:
        typer.echo(json.dumps(_plain(engine, rows, step), indent=2))
        return
    console = stdout_console()
    console.print(summary_table(engine, str(path)))
    title = f"A step of {num_tokens:,} tokens, {step.context_len:,} cached at its end"
    console.print(_operation_table(rows if every_layer else rows_by_layer_part(rows), title, console.width))


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
            {"name": row.name, "kind": row.kind, "shape": row.shape, "formats": row.formats, **asdict(row.cost)}
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


def _operations(number: int) -> str:
    """A number of operations in the unit that reads best."""
    for unit, factor in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:,.2f} {unit}"
    return str(number)
