"""Where the files of an engine are read from: a directory, or a buffer in memory. Used by `package.py`."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from tokenmill.errors import EngineFileError
from tokenmill.program.weight_file import Bytes

_COPY_AGAIN: Final = "The engine is incomplete: copy it again, or build it again with `tokenmill build`."


class EngineFiles(Protocol):
    """The files of one engine."""

    @property
    def folder(self) -> Path | None:
        """The directory, if there is one."""
        ...

    def title(self, name: str) -> str:
        """What errors call the file."""
        ...

    def read(self, name: str) -> Bytes:
        """The file's bytes, mapped or in place; not to be written.

        Raises:
            EngineFileError: it is missing or cannot be read.
        """
        ...

    def content(self, name: str) -> bytes | Path:
        """The file, to be kept for later."""
        ...


class FilesInFolder:
    """An engine directory."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path | None = folder
        self._path = folder

    def title(self, name: str) -> str:
        """The file's path."""
        return str(self._path / name)

    def read(self, name: str) -> Bytes:
        """The mapped file."""
        path = self._path / name
        try:
            if not path.is_file():
                raise EngineFileError(f"{path} is missing.", field="engine", remedy=_COPY_AGAIN)
            return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        except OSError as error:
            raise EngineFileError(
                f"{path} cannot be read: {error.strerror or error}.",
                field="engine",
                remedy="Check the file and its permissions.",
            ) from error

    def content(self, name: str) -> Path:
        """The file's path."""
        return self._path / name


class FilesInBuffer:
    """A tar archive in memory.

    Raises:
        EngineFileError: the buffer is no whole archive of plain files.
    """

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        self.folder: Path | None = None
        content = buffer if isinstance(buffer, bytes) else bytes(buffer)
        data = np.frombuffer(content, np.uint8)
        self._files: dict[str, Bytes] = {}
        try:
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
                for member in archive:
                    if member.isdir():
                        continue
                    end = member.offset_data + member.size
                    if not member.isreg() or end > data.nbytes:
                        raise _damaged_buffer(f"the entry {member.name!r} is no whole file")
                    self._files[member.name.removeprefix("./")] = data[member.offset_data : end]
        except tarfile.TarError as error:
            raise _damaged_buffer(str(error)) from None

    def title(self, name: str) -> str:
        """The file's name."""
        return f"{name} of the engine in the buffer"

    def read(self, name: str) -> Bytes:
        """A view of the buffer."""
        if name not in self._files:
            raise EngineFileError(f"{self.title(name)} is missing.", field="engine", remedy=_COPY_AGAIN)
        return self._files[name]

    def content(self, name: str) -> bytes:
        """A copy of the file."""
        return self._files[name].tobytes()


def write_buffer(contents: Mapping[str, bytes]) -> bytes:
    """A tar archive of files, that `FilesInBuffer` reads; the same for the same files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mode = 0o644
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def _damaged_buffer(what: str) -> EngineFileError:
    return EngineFileError(
        f"The buffer is not an engine: {what}.",
        field="engine",
        remedy="Pass what Engine.to_buffer returned, or a tar archive of an engine's files.",
    )
