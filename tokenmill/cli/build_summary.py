"""What `tokenmill build` and `tokenmill refit` print about an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from tokenmill.cli.console import readable_size, stdout_console

if TYPE_CHECKING:
    from tokenmill.builder.engine import Engine


def print_summary(engine: Engine, folder: Path) -> None:
    """A table on stdout."""
    stdout_console().print(summary_table(engine, str(folder)))


def summary_table(engine: Engine, title: str) -> Table:
    """The engine in a few lines."""
    config, report = engine.config, engine.config.report
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value))

    row("Model", f"{config.model.name} ({config.model.hf_config.get('model_type')})")
    row("Runs on", f"{config.target.device}, here with {engine.kernels} kernels")
    limits = config.limits
    row(
        "Largest sizes",
        f"{limits.max_batch_size} sequences, {limits.max_num_tokens:,} tokens a step, "
        f"{limits.max_seq_len:,} tokens a sequence ({limits.max_input_len:,} of prompt)",
    )
    row("Quantization", f"{config.quantization}; what is not quantized is {config.dtype}")
    row("KV cache", config.kv_cache_dtype)
    if report:
        row("Graph", f"{report['nodes_captured']:,} nodes, {report['nodes_after_passes']:,} after the passes")
        kinds = ", ".join(f"{count} {kind}" for kind, count in report["operations"].items())
        row("Program", f"{len(engine.program.operations):,} operations: {kinds}")
        formats = ", ".join(f"{readable_size(size)} {name}" for name, size in report["weight_bytes"].items())
        row("Weights", f"{readable_size(sum(report['weight_bytes'].values()))}: {formats}")
        saved = report["arena_sum_bytes"] / max(report["arena_bytes"], 1)
        row("Memory of a step", f"{readable_size(report['arena_bytes'])}, {saved:,.1f} times less than side by side")
        if report["kernels"]:
            row("Kernels", f"{report['kernels']['measured']} measured, {report['kernels']['reused']} known before")
        times = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in report["seconds"].items())
        row("Time", f"{sum(report['seconds'].values()):.2f} s: {times}")
    if config.stripped:
        row("Weights left out", "put them in with tokenmill refit")
    return table
