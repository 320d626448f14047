"""The memory plan of a model or a built engine as `tokenmill inspect` prints it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from tokenmill.cli.console import print_warning, readable_size, stdout_console

if TYPE_CHECKING:
    from tokenmill.inspection import MemoryReport


def print_memory(report: MemoryReport) -> None:
    """The plan on stdout; on stderr, why it does not fit this machine, if it does not."""
    stdout_console().print(_memory_table(report))
    if report.shortage is not None:
        print_warning(f"It does not fit this machine: {report.shortage}")


def _memory_table(report: MemoryReport) -> Table:
    memory = report.memory
    title = f"Memory on {report.device} in {report.weight_formats}"
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(overflow="fold")

    def row(name: str, num_bytes: int, note: str = "", style: str = "") -> None:
        table.add_row(name, readable_size(num_bytes), note, style=style)

    note = f"{report.num_parameters:,} parameters"
    if report.backend == "engine" and report.weight_formats != report.dtype:
        note += f", as the program reads them; what is not quantized is {report.dtype}"
    row("Weights", memory.weights, note)
    row(
        "KV cache",
        memory.kv_cache,
        f"{memory.cache_tokens:,} tokens in {memory.num_blocks:,} blocks, {report.cache_dtype}",
    )
    row("  per token", memory.kv_bytes_per_token)
    sequences = memory.cache_tokens // report.max_seq_len
    row("  per sequence", report.kv_bytes_per_sequence, f"of {report.max_seq_len:,} tokens; {sequences:,} of them fit")
    row("Activations", memory.activations, f"a step of {report.max_num_tokens:,} tokens, logits included")
    if memory.graphs:
        row("CUDA graphs", memory.graphs, "the largest step that is captured")
    row("Workspace", memory.slots, f"tokens and block tables of {report.max_batch_size} sequences")
    row("Total", memory.total, "" if memory.free is None else f"{readable_size(memory.free)} are free", style="bold")
    return table
