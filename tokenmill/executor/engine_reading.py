"""`start_reading`: a built engine is read on a thread of its own while the process imports torch.

Files are checked, and the weights of an engine for a CPU copied to the memory in which kernels read them fastest.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from tokenmill.ops.cpu.memory import huge_page_memory
from tokenmill.program.engine_config import is_engine
from tokenmill.program.package import EnginePackage
from tokenmill.program.weight_file import ALIGNMENT


def start_reading(model: str | Path) -> Callable[[], EnginePackage] | None:
    """Begin to read the engine in the directory `model`; None if it is none.

    Returns:
        Waits for the engine; raises what `EnginePackage.load` raises.
    """
    if not is_engine(Path(model)):
        return None
    outcome: Future[EnginePackage] = Future()

    def read() -> None:
        try:
            outcome.set_result(in_huge_pages(EnginePackage.load(model)))
        except BaseException as error:  # whoever waits for the engine gets it
            outcome.set_exception(error)

    threading.Thread(target=read, name="tokenmill-read", daemon=True).start()
    return outcome.result


def in_huge_pages(package: EnginePackage) -> EnginePackage:
    """The engine with its weights in huge pages, if it is for a CPU."""
    if package.config.target.device != "cpu":
        return package
    ends = list(
        itertools.accumulate(-(-content.nbytes // ALIGNMENT) * ALIGNMENT for content in package.weights.values())
    )
    if not ends:
        return package
    region = huge_page_memory(ends[-1])
    weights = {}
    for (name, content), begin in zip(package.weights.items(), [0, *ends], strict=False):
        weights[name] = region[begin : begin + content.nbytes]
        weights[name][:] = content  # other threads run meanwhile
    return replace(package, weights=weights, region=region)
