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
from tokenmill.program.program import Program
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
    repacked = _repacked(package.program)
    used = {name: content for name, content in package.weights.items() if name not in repacked}
    ends = list(itertools.accumulate(-(-content.nbytes // ALIGNMENT) * ALIGNMENT for content in used.values()))
    if not ends:
        return package
    region = huge_page_memory(ends[-1])
    weights = dict(package.weights)
    for (name, content), begin in zip(used.items(), [0, *ends], strict=False):
        weights[name] = region[begin : begin + content.nbytes]
        weights[name][:] = content  # other threads run meanwhile
    return replace(package, weights=weights, region=region)


def _repacked(program: Program) -> set[str]:
    """Names of the float matrices that products read. The executor makes packed copies of them; another copy of the
    rows would stay in memory beside those, read by nobody."""
    floats = {weight.name for weight in program.weights if weight.format in ("float32", "bfloat16")}
    matrices = {
        name
        for operation in program.operations
        if operation.kind in ("linear", "experts")
        for role, name in operation.weights.items()
        if role != "bias"
    }
    return floats & matrices
