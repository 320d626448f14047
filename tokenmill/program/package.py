"""`EnginePackage`: what a built engine consists of, and how it lies on disk or in one buffer.

The builder makes it, `Session` runs it. An engine directory holds `config.json`, `rank0/program.json`,
`rank0/weights.safetensors`, and beside them the tokenizer, `timing.cache` and `graph.html`; a buffer is a tar archive
of the same files. Both are checked from the first to the last byte before anything in them is used; see
`docs/engine-format.md`.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self, TypeAlias

import msgspec
import numpy as np

from tokenmill.errors import EngineFileError
from tokenmill.program.checks import check_program
from tokenmill.program.checksums import checksum
from tokenmill.program.encoding import decode_program, encode_program
from tokenmill.program.engine_config import (
    CONFIG_NAME,
    EngineConfig,
    FileRecord,
    decode_config,
    encode_config,
)
from tokenmill.program.engine_files import EngineFiles, FilesInBuffer, FilesInFolder, write_buffer
from tokenmill.program.engine_writing import FolderWriter, new_folder
from tokenmill.program.formats import rows_nbytes
from tokenmill.program.machine import INSTRUCTION_SETS, Processor, read_processor
from tokenmill.program.program import Program
from tokenmill.program.weight_file import ALIGNMENT, Bytes, read_weight_file, weight_file_chunks

PROGRAM_NAME: Final = "rank0/program.json"
WEIGHTS_NAME: Final = "rank0/weights.safetensors"
TIMING_CACHE_NAME: Final = "timing.cache"
PICTURE_NAME: Final = "graph.html"
TOKENIZER_FOLDER: Final = "tokenizer"

_OPTIONAL_NAMES: Final = (TIMING_CACHE_NAME, PICTURE_NAME)
_REBUILD: Final = "Build the engine again with `tokenmill build`."

FileContent: TypeAlias = bytes | Path
"""What is in a file, or another file with the same content."""


class _ExtractedFiles:
    """Files of a buffer in a temporary folder that goes when this object goes: tokenizers are loaded from files."""

    def __init__(self, files: Mapping[str, FileContent]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tokenmill-engine-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        for name, content in files.items():
            if isinstance(content, bytes):
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)


@dataclass(frozen=True, kw_only=True)
class EnginePackage:
    """A built engine.

    Args:
        config: everything besides program and weights; its `files` are those of the directory or buffer that the
            engine was read from, and empty for a new one.
        program: what is executed.
        weights: bytes of each weight of the program in its format and layout, and perhaps zeros behind them. A stripped
            engine has only the constants that come from no checkpoint.
        files: other files, by their path in the engine: the tokenizer's, `timing.cache`, `graph.html`.
        tokenizer_path: where the tokenizer can be loaded from; None: there is none.
        region: memory in which all weights lie as a CPU's kernels want them: in huge pages, each at a multiple of 64;
            None: they lie in a file that is mapped, or anywhere.
    """

    config: EngineConfig
    program: Program
    weights: Mapping[str, Bytes]
    files: Mapping[str, FileContent] = field(default_factory=dict)
    tokenizer_path: Path | None = None
    region: Bytes | None = field(default=None, repr=False)
    _extracted: _ExtractedFiles | None = field(default=None, repr=False)
    """Files that were taken out of a buffer; they live as long as the engine."""

    # ---- write -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the engine to the directory `path`, whole or not at all. An engine that is there is replaced.

        Raises:
            InvalidParameterError: something else is there, or nothing can be written there, or the disk is full.
        """
        with new_folder(path) as folder:
            self._write(FolderWriter(folder))
        return Path(path).expanduser()

    def to_buffer(self) -> bytes:
        """The engine as one buffer: a tar archive of the directory that `save` writes."""
        contents: dict[str, bytes] = {}

        def write(name: str, chunks: Iterable[Bytes]) -> FileRecord:
            contents[name] = b"".join(chunk.data for chunk in chunks)
            return FileRecord(num_bytes=len(contents[name]), checksum=checksum(_bytes(contents[name])))

        self._write(write)
        return write_buffer(contents)

    def _write(self, write: Callable[[str, Iterable[Bytes]], FileRecord]) -> None:
        """Hand every file to `write`, `config.json` last."""
        records = {
            PROGRAM_NAME: write(PROGRAM_NAME, [_bytes(encode_program(self.program))]),
            WEIGHTS_NAME: write(WEIGHTS_NAME, weight_file_chunks(self.weights)),
        }
        for name, content in self.files.items():
            records[name] = write(name, [_bytes(content.read_bytes() if isinstance(content, Path) else content)])
        config = msgspec.structs.replace(self.config, files=records)
        write(CONFIG_NAME, [_bytes(encode_config(config))])

    # ---- read ------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = True) -> Self:
        """The engine in the directory `path`. Weights stay in the file, which is mapped.

        Args:
            path: a directory that `save` wrote.
            verify: compare checksums, which reads all weights once; sizes are compared in any case.

        Raises:
            EngineFileError: a file is missing, damaged, or made by another version or for another machine.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise EngineFileError(
                f"There is no engine at {folder}: it is no directory.",
                field="engine",
                remedy="Give a directory that `tokenmill build` wrote.",
            )
        while True:
            with _kept(folder) as identity:
                try:
                    found = cls._read(FilesInFolder(folder), verify)
                except EngineFileError:
                    if _identity(folder) == identity:
                        raise
                    continue  # another engine came to this place while it was read: its files do not fit the others
                if _identity(folder) == identity:
                    return found

    @classmethod
    def from_buffer(cls, buffer: bytes | bytearray | memoryview, *, verify: bool = True) -> Self:
        """The engine in a buffer that `to_buffer` made, or in a tar archive of an engine's files.

        Raises:
            EngineFileError: as `load`.
        """
        return cls._read(FilesInBuffer(buffer), verify)

    @classmethod
    def _read(cls, files: EngineFiles, verify: bool) -> Self:
        config = decode_config(bytes(files.read(CONFIG_NAME)), files.title(CONFIG_NAME))
        check_target(config, read_processor(), files.title(CONFIG_NAME))
        _check_names(config, files.title(CONFIG_NAME))
        contents = {name: files.read(name) for name in config.files}
        for name, content in contents.items():
            _check_file(files.title(name), content, config.files[name], verify)
        program = decode_program(bytes(contents[PROGRAM_NAME]), files.title(PROGRAM_NAME))
        limits = config.limits
        check_program(
            program, files.title(PROGRAM_NAME), max_tokens=limits.max_num_tokens, max_rows=limits.max_num_rows
        )
        weights = read_weight_file(contents[WEIGHTS_NAME], files.title(WEIGHTS_NAME))
        _check_weights(program, weights, config.stripped, files.title(WEIGHTS_NAME))
        others = {name: files.content(name) for name in config.files if name not in (PROGRAM_NAME, WEIGHTS_NAME)}
        tokenizer: Path | None = None
        extracted: _ExtractedFiles | None = None
        if config.tokenizer is not None:
            root = files.folder
            if root is None:
                extracted = _ExtractedFiles(others)
                root = extracted.folder
            tokenizer = root / config.tokenizer
        return cls(
            config=config,
            program=program,
            weights=weights,
            files=others,
            tokenizer_path=tokenizer,
            _extracted=extracted,
        )

    # ---- use -------------------------------------------------------------------------------------------------

    @property
    def weight_nbytes(self) -> int:
        """Bytes of all weights in memory, each with what fills it up."""
        return sum(-(-content.nbytes // ALIGNMENT) * ALIGNMENT for content in self.weights.values())

    def check_runnable(self) -> None:
        """Raise if the engine cannot be run as it is.

        Raises:
            EngineFileError: its weights were stripped.
        """
        if self.config.stripped:
            raise EngineFileError(
                "The engine was built without weights.",
                field="engine",
                remedy="Put them in with `tokenmill refit ENGINE --weights CHECKPOINT`, or Engine.refit(checkpoint).",
            )

    def with_files(self, files: Mapping[str, FileContent]) -> Self:
        """The same engine with further files, such as `timing.cache` and `graph.html`."""
        return dataclasses.replace(self, files={**self.files, **files})


def check_target(config: EngineConfig, processor: Processor, source: str) -> None:
    """Check that this machine can run the engine.

    Raises:
        EngineFileError: it is for another kind of processor.
    """
    target = config.target
    wanted = f"{source} is of an engine for"
    remedy = f"Build it on this machine: tokenmill build {config.model.name} -o DIRECTORY."
    if target.architecture not in ("any", processor.architecture):
        raise EngineFileError(
            f"{wanted} a processor of the architecture {target.architecture}; this one is {processor.architecture}.",
            field="engine",
            remedy=remedy,
        )
    if target.instruction_set not in ("any", *processor.instruction_sets):
        needed = [name for name in INSTRUCTION_SETS.get(target.instruction_set, ()) if name not in processor.features]
        lacks = f" ({', '.join(needed)} missing)" if needed else ""
        raise EngineFileError(
            f"{wanted} processors with {target.instruction_set}; this one, {processor.model}, "
            f"has {', '.join(processor.instruction_sets)}{lacks}.",
            field="engine",
            remedy=remedy,
        )


@contextmanager
def _kept(folder: Path) -> Iterator[tuple[int, int] | None]:
    """`_identity` of the directory, which stays open meanwhile: when it is removed, no other one gets its number."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        descriptor = None
    if descriptor is None:
        yield _identity(folder)
        return
    try:
        yield _numbers(os.fstat(descriptor))
    finally:
        os.close(descriptor)


def _identity(folder: Path) -> tuple[int, int] | None:
    """Of the directory that is there now; None if there is none."""
    try:
        return _numbers(folder.stat())
    except OSError:
        return None


def _numbers(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _bytes(content: bytes) -> Bytes:
    return np.frombuffer(content, np.uint8)


def _check_names(config: EngineConfig, source: str) -> None:
    """Every file that must be there is listed, and nothing that could lie outside the engine."""
    for name in (PROGRAM_NAME, WEIGHTS_NAME):
        if name not in config.files:
            raise EngineFileError(f"{source} does not list {name}.", field="engine", remedy=_REBUILD)
    for name in config.files:
        parts = name.split("/")
        known = name in (PROGRAM_NAME, WEIGHTS_NAME, *_OPTIONAL_NAMES) or parts[0] == TOKENIZER_FOLDER
        if not known or "\\" in name or any(part in ("", ".", "..") for part in parts):
            raise EngineFileError(f"{source} lists the unknown file {name!r}.", field="engine", remedy=_REBUILD)
    if config.tokenizer is not None and config.tokenizer.split("/")[0] != TOKENIZER_FOLDER:
        raise EngineFileError(
            f"{source} says that the tokenizer is at {config.tokenizer!r}.", field="engine", remedy=_REBUILD
        )


def _check_file(title: str, content: Bytes, record: FileRecord, verify: bool) -> None:
    remedy = "The file is truncated or damaged: copy the engine again, or build it again with `tokenmill build`."
    if content.nbytes != record.num_bytes:
        raise EngineFileError(
            f"{title} has {content.nbytes:,} bytes instead of {record.num_bytes:,}.", field="engine", remedy=remedy
        )
    if verify and checksum(content) != record.checksum:
        raise EngineFileError(f"{title} was changed: its checksum differs.", field="engine", remedy=remedy)


def _check_weights(program: Program, weights: Mapping[str, Bytes], stripped: bool, source: str) -> None:
    """Every weight of the program is there, of the size that its format and shape need."""
    for weight in program.weights:
        content = weights.get(weight.name)
        if content is None:
            if stripped and weight.parts:
                continue
            raise EngineFileError(f"{source} lacks the weight '{weight.name}'.", field="engine", remedy=_REBUILD)
        if weight.layout == "rows":
            needed = rows_nbytes(weight.format, weight.shape)
            if not needed <= content.nbytes < needed + ALIGNMENT:
                raise EngineFileError(
                    f"{source}: the weight '{weight.name}' has {content.nbytes} bytes instead of {needed}.",
                    field="engine",
                    remedy=_REBUILD,
                )
    known = {weight.name for weight in program.weights}
    for name in weights:
        if name not in known:
            raise EngineFileError(
                f"{source} holds '{name}', which is no weight of the program.", field="engine", remedy=_REBUILD
            )
