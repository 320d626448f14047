"""`new_folder`: how an engine directory comes to its place: written beside it, and put there in one step when whole.

Whatever ends a write before (a full disk, Ctrl-C, a crash) leaves what was there before, and nothing that could be
taken for an engine. Two writers to one place do not meet: each has a folder of its own, and the last one stays.
Called by `package.py`; described in `docs/engine-format.md`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import numpy as np

from tokenmill.errors import InvalidParameterError
from tokenmill.program.checksums import checksum
from tokenmill.program.engine_config import FileRecord, is_engine
from tokenmill.program.weight_file import Bytes

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OCCUPIED: Final = (errno.ENOTEMPTY, errno.EEXIST)
_FORBIDDEN: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_FIXED: Final = (errno.EBUSY, errno.EXDEV)
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2  # linux/fs.h
_MAX_ATTEMPTS: Final = 100


def check_output(path: str | Path) -> Path:
    """Check that an engine can go to `path`, without writing anything: worth it before the work of building one.

    Returns:
        The directory, links followed.

    Raises:
        InvalidParameterError: something else is there, or nothing can be written there.
    """
    target = Path(os.path.realpath(Path(path).expanduser()))
    try:
        if target.exists() and not (is_engine(target) or (target.is_dir() and not any(target.iterdir()))):
            raise InvalidParameterError(
                f"{path} exists and is not an engine.", field="output", remedy="Name a new or an empty directory."
            )
        if os.path.ismount(target):
            raise InvalidParameterError(
                f"{path} is where a file system is mounted, and cannot be replaced.",
                field="output",
                remedy=f"Name a directory in it, such as {Path(path) / 'engine'}.",
            )
        above = _first_existing(target.parent)
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))
    except OSError as error:
        raise _cannot_write(path, error) from error
    return target


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A new folder, to be filled by the block; at its end it takes the place of `path`, and of the engine there.

    If the block raises, the folder is removed and `path` is as it was. Folders of writers that died are removed, too.

    Raises:
        InvalidParameterError: something else than an engine is there, or the disk is full, or may not be written to.
    """
    target = check_output(path)
    made: list[Path] = []
    folders: list[Path] = []
    try:
        try:
            made.extend(_make_parents(target))
            _remove_leftovers(target)
            with _claimed_folder(target, folders) as folder:
                yield folder
                _sync_folders(folder)
                _put_in_place(folder, target)
        finally:
            for one in folders:
                shutil.rmtree(one, ignore_errors=True)  # what is left of it, or the engine that was replaced
            for parent in reversed(made):
                with suppress(OSError):  # it is used: by this engine, or by somebody else
                    parent.rmdir()
    except OSError as error:
        raise _cannot_write(path, error) from error


class FolderWriter:
    """Writes files into a new directory and says what they are.

    Args:
        folder: the directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str, chunks: Iterable[Bytes]) -> FileRecord:
        """Write `chunks` one after the other to the file `name`, to the disk."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            for chunk in chunks:
                file.write(chunk.data)
            file.flush()
            os.fsync(file.fileno())
        content = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        return FileRecord(num_bytes=content.nbytes, checksum=checksum(content))


# ---- putting a folder in its place -----------------------------------------------------------------------------------


def _put_in_place(folder: Path, target: Path) -> None:
    """Make `folder` the directory `target`. What was there is at `folder` afterwards, or gone.

    At every moment there is a whole engine at `target` if there was one, on file systems that can exchange two names.
    """
    for attempt in range(_MAX_ATTEMPTS):
        try:
            folder.rename(target)  # nothing is there, or an empty directory
            break
        except OSError as error:
            if error.errno not in _OCCUPIED or attempt == _MAX_ATTEMPTS - 1:
                raise
        if not is_engine(target):  # since we looked, somebody put something else there
            raise FileExistsError(errno.EEXIST, "it is not an engine", str(target))
        if _exchange(folder, target):
            break
        if _replace(folder, target):
            break
    _sync(target.parent)


def _exchange(folder: Path, target: Path) -> bool:
    """Swap the names of two directories in one step; False if that cannot be done here, or `target` is gone."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):  # not Linux, or an old C library
        return False
    names = (ctypes.c_char_p(os.fsencode(folder)), ctypes.c_char_p(os.fsencode(target)))
    return not library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE))


def _replace(folder: Path, target: Path) -> bool:
    """Swap them with two renames, between which `target` is missing; False if another writer was faster."""
    old = folder.with_name(f"{folder.name}.old")
    with _locked(target):
        try:
            target.rename(old)
            folder.rename(target)
        except BaseException as error:  # Ctrl-C, too
            with suppress(OSError):  # it was not renamed, or another engine came into the gap
                old.rename(target)
            if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno in _OCCUPIED):
                return False
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    return True


# ---- folders of writers that died ------------------------------------------------------------------------------------


@contextmanager
def _claimed_folder(target: Path, made: list[Path]) -> Iterator[Path]:
    """A new folder beside `target`, its name added to `made`; nobody takes it for a leftover while the block runs."""
    for _ in range(_MAX_ATTEMPTS):
        folder = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        made.append(folder)
        folder.mkdir()
        with _locked(folder):
            if folder.exists():  # nobody removed it before it was locked
                yield folder
                return
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """While the block runs, nobody takes `folder` for a leftover; the lock ends with the process, however it ends."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield
        return
    try:
        with suppress(OSError):  # a file system without locks: then nobody gets one, and nobody removes anything
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # others hold it for as long as it takes to remove the folder
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(target: Path) -> None:
    """Remove the folders beside `target` that writers to it left when they were killed."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{32}}(\.old)?")
    with suppress(OSError):  # it cannot be listed
        for folder in [one for one in target.parent.iterdir() if pattern.fullmatch(one.name)]:
            remove_unless_in_use(folder)


def remove_unless_in_use(folder: Path) -> None:
    """Remove a folder of a writer that died; one whose writer lives stays."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # its writer lives
        return
    finally:
        os.close(descriptor)


def _make_parents(target: Path) -> list[Path]:
    """Make the directories above `target`; those that were not there, outermost first."""
    missing = []
    parent = target.parent
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
    return missing[::-1]


# ---- the disk --------------------------------------------------------------------------------------------------------


def _first_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _sync_folders(folder: Path) -> None:
    """Names are on the disk before the engine gets its own: after a loss of power it is whole, or was never there."""
    for one in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync(one)


def _sync(folder: Path) -> None:
    with suppress(OSError):  # not every file system syncs directories
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cannot_write(path: str | Path, error: OSError) -> InvalidParameterError:
    """What went wrong with the directory that the user named; names in our own folder beside it say nothing."""
    target = Path(os.path.realpath(Path(path).expanduser()))
    what = error.strerror or str(error)
    if error.filename is not None and not str(error.filename).startswith(str(target.with_name(f".{target.name}."))):
        what = f"{what} ({error.filename})"
    remedy = None
    if error.errno in _FULL:
        remedy = "Make room, or name a directory on another disk."
        with suppress(OSError):
            free = shutil.disk_usage(_first_existing(target.parent)).free
            remedy = f"{free / 2**20:,.0f} MiB are free there. {remedy}"
    elif error.errno in _FORBIDDEN:
        remedy = "Name a directory that you may write to."
    elif error.errno in _FIXED:
        remedy = "It cannot be replaced where it is: name a new directory."
    return InvalidParameterError(f"The engine cannot be written to {path}: {what}.", field="output", remedy=remedy)
