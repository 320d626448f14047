"""The file of measured choices: round trips, damage, several processes, bounds. No GPU and no torch is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from filelock import FileLock

from tests.support.source_tree import ROOT, loaded_by, package_modules
from tokenmill.ops import product_choices
from tokenmill.ops.product_choices import (
    GpuMachine,
    ProductChoice,
    ProductChoices,
    ProductKey,
    choices_folder,
    first_shared_rows,
    shared_rows,
)

pytestmark = pytest.mark.spec("D3")

MACHINE = GpuMachine(device="NVIDIA H100 80GB HBM3", capability="9.0", driver=13000, cublas_lt=130002, torch="2.11.0")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))


def choice(num_rows: int, algorithm: bytes | None = b"\x01" * 64, microseconds: float = 23.25) -> ProductChoice:
    return ProductChoice(ProductKey(num_rows, 6144, 4096, "bfloat16"), algorithm, "128 x 256 rows", microseconds, 28.0)


def save(*choices: ProductChoice, machine: GpuMachine = MACHINE) -> ProductChoices:
    saved = ProductChoices(machine, list(choices))
    saved.save()
    return saved


def test_what_is_saved_is_loaded() -> None:
    assert ProductChoices.load(MACHINE) == ProductChoices(MACHINE)
    assert ProductChoices.newest() is None
    saved = save(choice(512), choice(176, None))
    assert ProductChoices.load(MACHINE) == saved == ProductChoices.newest()
    save(choice(512, microseconds=20.0), choice(1024))
    assert ProductChoices.load(MACHINE).choices == [choice(512, microseconds=20.0), choice(176, None), choice(1024)]
    assert MACHINE.versions == "cuBLASLt 13.0.2, torch 2.11.0"


@pytest.mark.parametrize(
    "change",
    [
        {"device": "NVIDIA H200"}, {"capability": "9.1"}, {"driver": 13010}, {"cublas_lt": 130100}, {"torch": "2.12"},
        {"measurement": 0},
    ],
)  # fmt: skip
def test_another_machine_has_another_file(change: dict[str, Any]) -> None:
    other = replace(MACHINE, **change)
    save(choice(512))
    assert ProductChoices.load(other).choices == []
    assert other.path != MACHINE.path
    MACHINE.path.rename(other.path)
    assert ProductChoices.load(other).choices == [], "a file that came under this name is not believed"


def test_what_another_version_measured_is_not_shown() -> None:
    save(choice(512), machine=replace(MACHINE, measurement=product_choices.MEASUREMENT + 1))
    assert ProductChoices.newest() is None


def _cut(text: bytes) -> bytes:
    return text[: len(text) // 2]


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        lambda text: b"",
        lambda text: b"null",
        lambda text: b"[]",
        lambda text: b"\xff\xfe" + text,
        lambda text: b"[" * 200_000,
        lambda text: text.replace(b"[512,", b'["512",'),
        lambda text: text.replace(b"[512,", b"["),
        lambda text: text.replace(b"28.0", b"NaN"),
        lambda text: text.replace(b'"AQ', b'"!!'),
        lambda text: text.replace(b'"device"', b'"other"'),
    ],
)
def test_a_damaged_file_is_measured_again(damage: Callable[[bytes], bytes]) -> None:
    save(choice(512))
    text = MACHINE.path.read_bytes()
    assert damage(text) != text
    MACHINE.path.write_bytes(damage(text))
    assert ProductChoices.load(MACHINE).choices == []
    assert ProductChoices.newest() is None
    saved = save(choice(1024))
    assert ProductChoices.load(MACHINE) == saved


@pytest.mark.parametrize("error", [None, OSError("full"), NotImplementedError("no locks")])
def test_what_cannot_be_written_is_said(
    error: Exception | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    MACHINE.path.mkdir(parents=True)
    if error is not None:
        monkeypatch.setattr(FileLock, "acquire", Mock(side_effect=error))
    save(choice(512))
    assert "not kept for the next start" in caplog.text
    assert ProductChoices.load(MACHINE).choices == []
    assert not list(choices_folder().glob("*.partial"))


SAVES = """
import sys
from tests.ops.test_product_choices import choice, save
for index in range(20):
    save(choice(1000 * int(sys.argv[1]) + index))
"""


def test_processes_that_save_at_the_same_time_lose_nothing() -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", SAVES, str(number)], cwd=ROOT, stderr=subprocess.PIPE)
        for number in (1, 2, 3)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, b"")
    found = {one.product.num_rows for one in ProductChoices.load(MACHINE).choices}
    assert found == {1000 * number + index for number in (1, 2, 3) for index in range(20)}
    assert {path.name for path in choices_folder().iterdir()} == {".lock", MACHINE.path.name}


def test_files_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_choices, "MAX_CHOICES", 3)
    monkeypatch.setattr(product_choices, "MAX_FILES", 2)
    for num_rows in (1, 2, 3, 4, 5):
        save(choice(num_rows))
    assert ProductChoices.load(MACHINE).choices == [choice(3), choice(4), choice(5)]
    os.utime(MACHINE.path, (1.0, 1.0))
    machines = [replace(MACHINE, driver=driver) for driver in (1, 2, 3)]
    for age, machine in enumerate(machines):
        save(choice(7), machine=machine)
        stamp = 10.0 + age
        os.utime(machine.path, (stamp, stamp))
    save(choice(8), machine=machines[0])
    kept = {path.name for path in choices_folder().glob("*.json")}
    assert kept == {machines[0].path.name, machines[2].path.name}


def test_numbers_of_rows_that_share_a_choice() -> None:
    numbers = (1, 2, 65, 72, 129, 232, 512, 1000, 1025, 8190)
    assert [shared_rows(number) for number in numbers] == [1, 2, 72, 72, 144, 240, 512, 1024, 2048, 8192]
    for number in range(1, 9000):
        shared = shared_rows(number)
        first = first_shared_rows(shared)
        assert first <= number <= shared == shared_rows(first)
        assert first == 1 or shared_rows(first - 1) == first - 1


def test_the_file_is_read_without_torch() -> None:
    assert "torch" not in loaded_by("tokenmill.ops.product_choices", package_modules())
