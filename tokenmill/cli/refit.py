"""`tokenmill refit`: new weights into an engine, without building it again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenmill.cli.build_summary import print_summary
from tokenmill.cli.command import command, ended_by_signals, examples
from tokenmill.cli.console import progress

_EPILOG = examples(
    ("The weights of a fine-tuned model", "tokenmill refit engines/smollm2 --weights my-smollm2"),
    ("Weights for an engine that was built without", "tokenmill refit engine --weights smollm2:135m -o full-engine"),
)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "refit", epilog=_EPILOG)(refit)


def refit(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="The engine's directory.")],
    *,
    weights: Annotated[
        str, typer.Option("--weights", "-w", metavar="CHECKPOINT", help="A model of the same shape, to take them from.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Where the new engine goes.",
            show_default="in the place of the old one",
        ),
    ] = None,
) -> None:
    """Put the weights of another checkpoint of the same model into an engine.

    Nothing is captured or planned again. Weights are stored in the engine's formats. A checkpoint whose tensors have
    other names or shapes is refused, and the engine stays as it was.
    """
    with progress("Starting"):
        from tokenmill.builder.engine import Engine
        from tokenmill.program.engine_writing import check_output
    opened = Engine.load(engine)
    check_output(engine if output is None else output)
    with ended_by_signals(), progress("Packing weights"):
        refitted = opened.refit(weights)
        folder = refitted.save(engine if output is None else output)
    print_summary(refitted, folder)
