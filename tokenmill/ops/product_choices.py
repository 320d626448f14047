"""`ProductChoices`: what was measured of products on a GPU, and its file in the cache folder, which later starts read.

A choice names one of the library's algorithms by its bytes, which mean nothing to another version: so each device and
each version of what takes part has a file of its own. `ops.library_product` measures and asks; `inspection` prints.
No torch: the file says everything that is printed.
"""

from __future__ import annotations

import hashlib
import logging
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from filelock import FileLock

from tokenmill.env import read_environment

logger = logging.getLogger(__name__)

MEASUREMENT: Final = 1
"""Version of what is measured and how; to be raised when that changes, so that everything is measured again."""
LARGEST_STEP: Final = 1024
"""Numbers of rows above share a choice with all up to the next power of two."""
MAX_CHOICES: Final = 1000
"""In a file; those that were measured first make room."""
MAX_FILES: Final = 8
"""Those that were written first make room: they are of drivers and versions that are gone."""
LOCK_SECONDS: Final = 10.0


class ProductKey(NamedTuple):
    """A product [T, I] by [O, I] to [T, O] of a 16-bit type; `num_rows` is the largest T that shares the choice."""

    num_rows: int
    out_features: int
    in_features: int
    dtype: str


@dataclass(frozen=True, slots=True)
class ProductChoice:
    """What multiplies a product fastest.

    Args:
        product: what was measured.
        algorithm: cuBLASLt's, as it writes it; None: torch's own choice is as good.
        name: of the algorithm, as text.
        microseconds: that it takes, with a weight that is in no cache.
        torch_microseconds: that torch takes.
    """

    product: ProductKey
    algorithm: bytes | None
    name: str
    microseconds: float
    torch_microseconds: float


@dataclass(frozen=True, slots=True)
class GpuMachine:
    """Everything that choices depend on besides the product.

    Args:
        device: name of the GPU.
        capability: its compute capability.
        driver: newest CUDA that the driver knows.
        cublas_lt: version of the library.
        torch: version of torch.
        measurement: `MEASUREMENT`.
    """

    device: str
    capability: str
    driver: int
    cublas_lt: int
    torch: str
    measurement: int = MEASUREMENT

    @property
    def versions(self) -> str:
        """Of the library and torch, as text."""
        major, rest = divmod(self.cublas_lt, 10_000)
        return f"cuBLASLt {major}.{rest // 100}.{rest % 100}, torch {self.torch}"

    @property
    def path(self) -> Path:
        """Of its file."""
        digest = hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:12]
        return choices_folder() / f"{re.sub('[^A-Za-z0-9]+', '-', self.device)}-{digest}.json"


@dataclass(slots=True)
class ProductChoices:
    """Of one machine.

    Args:
        machine: where they were measured.
        choices: in the order in which they were measured.
    """

    machine: GpuMachine
    choices: list[ProductChoice] = field(default_factory=list)

    @staticmethod
    def load(machine: GpuMachine) -> ProductChoices:
        """What the machine's file holds; nothing if there is none, or none that can be read."""
        found = _read(machine.path)
        return found if found is not None and found.machine == machine else ProductChoices(machine)

    @staticmethod
    def newest() -> ProductChoices | None:
        """Of the machine that measured last, if this version can read it."""
        found = (_read(path) for path in _newest_first())
        return next((one for one in found if one is not None and one.machine.measurement == MEASUREMENT), None)

    @property
    def by_product(self) -> dict[ProductKey, ProductChoice]:
        """The same; of a product that was measured twice, the later one."""
        return {choice.product: choice for choice in self.choices}

    def save(self) -> None:
        """Add the choices to the file, to what other processes wrote meanwhile. Written whole, or not at all."""
        path = self.machine.path
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(".lock"), timeout=LOCK_SECONDS):
                together = ProductChoices.load(self.machine).by_product | self.by_product
                kept = ProductChoices(self.machine, list(together.values())[-MAX_CHOICES:])
                try:
                    partial.write_bytes(msgspec.json.encode(kept))
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
                for old in _newest_first()[MAX_FILES:]:
                    old.unlink(missing_ok=True)
        except (OSError, NotImplementedError) as error:  # the second: a file system without locks
            logger.warning("Choices of algorithms are not kept for the next start: %s", error)


def choices_folder() -> Path:
    """Where the files are."""
    return read_environment().cache_dir / "products"


def shared_rows(num_rows: int) -> int:
    """Numbers of rows with the same result share a choice: steps of a sixteenth to an eighth, then powers of two."""
    step = _step(num_rows)
    return -(-num_rows // step) * step


def first_shared_rows(num_rows: int) -> int:
    """The smallest number of rows with this `shared_rows`."""
    smaller_octave = (1 << (num_rows - 1).bit_length()) >> 1
    return max(num_rows - _step(num_rows), smaller_octave) + 1


def _step(num_rows: int) -> int:
    octave = (num_rows - 1).bit_length()
    return 1 << (octave if num_rows > LARGEST_STEP else max(0, octave - 4))


def _read(path: Path) -> ProductChoices | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=ProductChoices)
    except (OSError, ValueError, RecursionError, msgspec.DecodeError):
        return None


def _newest_first() -> list[Path]:
    with suppress(OSError):
        return sorted(choices_folder().glob("[!.]*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return []
