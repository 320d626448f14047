"""Environment variables that tokenmill reads, all in one place.

    TOKENMILL_CACHE    folder for downloaded models, built engines, compiled kernels and what was measured of them
                       (default: `$XDG_CACHE_HOME/tokenmill`, else `~/.cache/tokenmill`)

Hub downloads follow huggingface_hub's own variables (`HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`, ...).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The variables, parsed."""

    cache_dir: Path
    """Folder for what tokenmill downloads, builds, compiles and measures; it need not exist yet."""


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Parse `variables` (default: the process's own). An empty variable counts as not set."""
    found = os.environ if variables is None else variables
    if own := found.get("TOKENMILL_CACHE"):
        return Environment(cache_dir=Path(own).expanduser())
    if shared := found.get("XDG_CACHE_HOME"):
        return Environment(cache_dir=Path(shared).expanduser() / "tokenmill")
    return Environment(cache_dir=Path.home() / ".cache" / "tokenmill")
