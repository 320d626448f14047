"""Which captures torch.export has confirmed: a second build of a model need not wait for it again.

A capture is first recorded, within milliseconds, and then compared with what torch.export gives, which takes seconds.
The comparison comes out the same as long as the recorded graph, torch and the code that made it are the same; their
hash is the name of an empty file in a folder of the user's cache. Called by `capture.py`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import torch

from tokenmill.builder.graph import Graph

_SOURCES: Final = ("models/*.py", "layers/*.py", "ops/*.py", "attention/base.py", "builder/*.py")
"""The code that a capture depends on, below the package's folder."""


class CaptureProofs:
    """The confirmed captures.

    Args:
        folder: where they are noted; None: nowhere, every capture is confirmed anew.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def has(self, graph: Graph) -> bool:
        """Whether torch.export gave this very graph before."""
        return self._folder is not None and (self._folder / capture_key(graph)).exists()

    def add(self, graph: Graph) -> None:
        """Note that it did. A folder that cannot be written costs time at the next build, nothing else."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / capture_key(graph)).touch()
        except OSError:
            return


def capture_key(graph: Graph) -> str:
    """Hash of the graph, of torch's version and of the code."""
    found = hashlib.sha256(f"{torch.__version__}\n{graph.text()}\n{sorted(graph.constants.items())}".encode())
    package = Path(__file__).parent.parent
    for pattern in _SOURCES:
        for path in sorted(package.glob(pattern)):
            found.update(path.read_bytes())
    return found.hexdigest()[:32]
