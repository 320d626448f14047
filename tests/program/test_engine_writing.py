"""Whatever ends a write, an engine directory is whole: the old one or the new one; and nothing is left beside it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_checkpoint import write_tiny_model
from tests.support.tiny_packages import tiny_package
from tokenmill.errors import EngineFileError, InvalidParameterError
from tokenmill.program import engine_writing
from tokenmill.program.engine_config import CONFIG_NAME, is_engine
from tokenmill.program.engine_files import FilesInFolder
from tokenmill.program.engine_writing import check_output, new_folder, remove_unless_in_use
from tokenmill.program.package import PROGRAM_NAME, WEIGHTS_NAME, EnginePackage

pytestmark = pytest.mark.spec("D1")

ROOT = Path(__file__).resolve().parents[2]
FILES = (PROGRAM_NAME, WEIGHTS_NAME, "tokenizer/tokenizer.json", CONFIG_NAME)

WRITER = """
import os, resource, select, sys
from tokenmill.program.package import EnginePackage

source, target, moment = sys.argv[1:]
if moment.startswith("limit"):  # a write of more is an error instead of a signal, as Python sets it up
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(moment.split()[1]),) * 2)
package = EnginePackage.load(source).with_files({"timing.cache": b"new"})

def hold(event, arguments):
    if event == moment.partition(" ")[0] and f"/.engine." in str(arguments[0]) and str(arguments[0]).endswith(
        moment.partition(" ")[2]
    ):
        print("here", flush=True)
        while True:
            select.select([], [], [], 0.05)  # until the signal comes

sys.addaudithook(hold)
try:
    package.save(target)
except KeyboardInterrupt:
    sys.exit(130)
except Exception as error:
    print(error)
    sys.exit(2)
"""

REWRITER = """
import sys
from tokenmill.program.package import EnginePackage

source, target, name, count = sys.argv[1:]
package = EnginePackage.load(source).with_files({"timing.cache": name.encode()})
for _ in range(int(count)):
    package.save(target)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> EnginePackage:
    return tiny_package(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def source(package: EnginePackage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine that others are made of."""
    return package.save(tmp_path_factory.mktemp("source") / "source")


@pytest.fixture
def engine(source: Path, tmp_path: Path) -> Path:
    """An engine that is to be replaced."""
    return Path(shutil.copytree(source, tmp_path / "place" / "engine"))


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def wait_until_there(process: subprocess.Popen[str]) -> None:
    """Wait until the writer says that it has come to its moment."""
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"


def is_untouched(engine: Path) -> bool:
    """Whether the old engine is there, whole, alone, and not the new one."""
    EnginePackage.load(engine)
    return not (engine / "timing.cache").exists() and names(engine.parent) == ["engine"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- ended in the middle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", [f"open {name}" for name in FILES] + ["os.mkdir rank0", "os.rename "])
def test_ctrl_c_leaves_what_was_there(source: Path, engine: Path, moment: str) -> None:
    """The process stops at the moment and says so; only then it is interrupted."""
    for target in (engine, engine.parent / "made" / "engine"):
        with start(WRITER, source, target, moment) as process:
            wait_until_there(process)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        assert is_untouched(engine)


@pytest.mark.parametrize("moment", [f"open {WEIGHTS_NAME}", "os.rename "])
def test_a_killed_writer_harms_nobody_and_the_next_one_clears_up(source: Path, engine: Path, moment: str) -> None:
    with start(WRITER, source, engine, moment) as process:
        wait_until_there(process)
        (left,) = (path for path in engine.parent.iterdir() if path != engine)
        remove_unless_in_use(left)
        assert left.exists()  # its writer lives
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
    EnginePackage.load(engine)
    EnginePackage.load(source).save(engine)
    assert is_untouched(engine)


@pytest.mark.parametrize("limit", [100, 30_000])
def test_a_file_that_cannot_grow_leaves_what_was_there(source: Path, engine: Path, limit: int) -> None:
    """The kernel refuses to write more, in the program or in the weights."""
    assert (source / PROGRAM_NAME).stat().st_size < 30_000 < (source / WEIGHTS_NAME).stat().st_size
    for target in (engine, engine.parent / "made" / "engine"):
        process = start(WRITER, source, target, f"limit {limit}")
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 2
        assert f"cannot be written to {target}: File too large" in said
        assert "MiB are free there. Make room" in said
        assert is_untouched(engine)


@pytest.mark.parametrize("file", range(6))
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_what_was_there(
    package: EnginePackage, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: int, call: str
) -> None:
    """Full while file number `file` is written, or only when its bytes must go to the disk."""
    opened: list[Path] = []
    real_open, real_fsync = Path.open, os.fsync

    class FullFile:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __enter__(self) -> FullFile:
            return self

        def __exit__(self, *_: object) -> None:
            self.inner.close()

        def write(self, content: memoryview) -> None:
            self.inner.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        found = real_open(path, mode, *arguments, **options)
        if mode == "xb":
            opened.append(path)
            return FullFile(found) if call == "write" and len(opened) == file + 1 else found
        return found

    def fsync(descriptor: int) -> None:
        if call == "fsync" and len(opened) == file + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(descriptor)

    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr(os, "fsync", fsync)
    new = package.with_files({"timing.cache": b"new"})
    for target in (engine, tmp_path / "place" / "made" / "deep" / "engine"):
        opened.clear()
        with pytest.raises(InvalidParameterError, match="No space left on device") as caught:
            new.save(target)
        assert str(target) in caught.value.message
        assert "Make room, or name a directory on another disk" in str(caught.value)
        assert len(opened) == file + 1
        assert is_untouched(engine)


# ---- at the same time ------------------------------------------------------------------------------------------------


def test_writers_of_one_place_and_their_readers_do_not_meet(source: Path, engine: Path) -> None:
    num_reads = 0
    with (
        start(REWRITER, source, engine, "first", 12) as first,
        start(REWRITER, source, engine, "second", 12) as second,
    ):
        while first.poll() is None or second.poll() is None:
            EnginePackage.load(engine)  # whole at any moment
            num_reads += 1
        assert (first.returncode, second.returncode) == (0, 0)
    assert num_reads > 0
    assert (engine / "timing.cache").read_bytes() in (b"first", b"second")
    EnginePackage.load(engine)
    assert names(engine.parent) == ["engine"]


@pytest.mark.parametrize("name", [PROGRAM_NAME, WEIGHTS_NAME])
def test_an_engine_that_is_replaced_while_it_is_read_is_read_again(
    package: EnginePackage, engine: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real_read = FilesInFolder.read
    smaller = package.with_files({"graph.html": b"another page"})
    pending: list[Callable[[], Path]] = [lambda: smaller.save(engine)]

    def read(files: FilesInFolder, wanted: str) -> Any:
        if wanted == name and pending:
            pending.pop()()
        return real_read(files, wanted)

    monkeypatch.setattr(FilesInFolder, "read", read)
    loaded = EnginePackage.load(engine)
    assert loaded.config.files["graph.html"].num_bytes == len(b"another page")
    (engine / WEIGHTS_NAME).unlink()
    with pytest.raises(EngineFileError, match="is missing"):  # damage stays damage
        EnginePackage.load(engine)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's list of open files")
def test_a_directory_that_is_read_keeps_its_number_when_it_is_replaced(
    package: EnginePackage, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems give the number of a removed directory to a new one, which a reader would take for the old one."""
    real_read = FilesInFolder.read
    first = engine.stat().st_ino
    kept: list[bool] = []

    def read(files: FilesInFolder, wanted: str) -> Any:
        if wanted == PROGRAM_NAME and not kept:
            package.save(engine)
            kept.append(first in open_numbers())
        return real_read(files, wanted)

    monkeypatch.setattr(FilesInFolder, "read", read)
    EnginePackage.load(engine)
    assert kept == [True]
    assert first not in open_numbers() and engine.stat().st_ino not in open_numbers()


def open_numbers() -> set[int]:
    """Of the directories that this process has open."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one of the list itself
            status = os.fstat(int(entry.name))
            if stat.S_ISDIR(status.st_mode):
                found.add(status.st_ino)
    return found


def test_a_folder_that_is_removed_before_it_is_claimed_is_made_again(
    package: EnginePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer takes the new folder for a leftover in the moment before it is locked."""
    real_mkdir = Path.mkdir
    made: list[Path] = []

    def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
        real_mkdir(path, *arguments, **options)
        if path.parent == tmp_path:
            made.append(path)
            if len(made) == 1:
                remove_unless_in_use(path)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    package.save(tmp_path / "engine")
    assert len(set(made)) == 2
    assert names(tmp_path) == ["engine"]


# ---- file systems that cannot exchange names -------------------------------------------------------------------------


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_writing, "_exchange", lambda folder, target: False)


@pytest.mark.usefixtures("no_exchange")
def test_two_renames_replace_an_engine(package: EnginePackage, engine: Path) -> None:
    package.with_files({"timing.cache": b"new"}).save(engine)
    assert (engine / "timing.cache").read_bytes() == b"new"
    assert names(engine.parent) == ["engine"]


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", ["before", "after the first", "before the second"])
def test_between_two_renames_the_old_engine_comes_back(
    package: EnginePackage, engine: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, when: str
) -> None:
    real_rename = Path.rename

    def rename(path: Path, target: Path) -> Path:
        is_first = path == engine
        is_second = not is_first and target == engine and not engine.exists()
        is_back = path.name.endswith(".old")
        if (is_first and when == "before") or (is_second and not is_back and when == "before the second"):
            raise error
        real_rename(path, target)
        if is_first and when == "after the first":
            raise error
        return target

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((InvalidParameterError, KeyboardInterrupt)):
        package.with_files({"timing.cache": b"new"}).save(engine)
    assert is_untouched(engine)


@pytest.mark.usefixtures("no_exchange")
def test_an_engine_that_comes_between_two_renames_is_replaced(
    package: EnginePackage, source: Path, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_rename = Path.rename

    def rename(path: Path, target: Path) -> Path:
        found = real_rename(path, target)
        if target.name.endswith(".old") and not seen:
            seen.append(target)
            shutil.copytree(source, engine)
        return found

    seen: list[Path] = []
    monkeypatch.setattr(Path, "rename", rename)
    package.with_files({"timing.cache": b"new"}).save(engine)
    assert seen
    assert (engine / "timing.cache").read_bytes() == b"new"
    assert names(engine.parent) == ["engine"]


# ---- places ----------------------------------------------------------------------------------------------------------


def test_an_engine_behind_a_link_is_replaced_and_the_link_stays(package: EnginePackage, engine: Path) -> None:
    link = engine.parent / "current"
    link.symlink_to("engine", target_is_directory=True)
    package.with_files({"timing.cache": b"new"}).save(link)
    assert link.is_symlink()
    assert (engine / "timing.cache").read_bytes() == b"new"
    assert names(engine.parent) == ["current", "engine"]


def test_what_is_left_of_an_engine_does_not_block_the_next(package: EnginePackage, engine: Path) -> None:
    (engine / CONFIG_NAME).unlink()
    assert is_engine(engine)
    package.save(engine)
    assert is_untouched(engine)


def test_places_that_cannot_be_written_are_refused_before_the_work(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(InvalidParameterError, match=r"Not a directory .*/file\). Name a directory that you may"):
        check_output(tmp_path / "file" / "engine")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == engine)
    with pytest.raises(InvalidParameterError, match=r"mounted.*Name a directory in it, such as .*/engine/engine"):
        check_output(engine)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InvalidParameterError, match=r"Permission denied .*you may write to") as caught:
        check_output(tmp_path / "new" / "engine")
    assert caught.value.field == "output"
    assert check_output(engine.parent / "new") == engine.parent / "new"


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EACCES, "you may write to"), (errno.EROFS, "you may write to"), (errno.EBUSY, "new")]
)
def test_a_folder_that_cannot_be_made_says_what_to_do(
    engine: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(InvalidParameterError, match=remedy) as caught, new_folder(engine):
        pytest.fail("there is no folder")
    assert caught.value.message == f"The engine cannot be written to {engine}: {os.strerror(number)}."


def test_a_file_that_cannot_be_read_is_named(package: EnginePackage, engine: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match=r"No such file or directory \(.*/gone\.html\)"):
        package.with_files({"graph.html": tmp_path / "gone.html"}).save(engine)
    assert is_untouched(engine)
