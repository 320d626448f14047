"""Programs survive their JSON text, and what is not exactly one is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.tiny_checkpoint import write_tiny_model
from tests.support.tiny_packages import tiny_package
from tokenmill.errors import EngineFileError
from tokenmill.program.encoding import decode_program, encode_program
from tokenmill.program.program import Program

pytestmark = pytest.mark.spec("D1")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return tiny_package(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")).program


def test_a_program_survives_its_text(program: Program) -> None:
    text = encode_program(program)
    assert decode_program(text, "x") == program
    assert text == encode_program(decode_program(text, "x"))


def test_the_text_has_a_line_for_each_operation(program: Program) -> None:
    lines = encode_program(program).decode().splitlines()
    for operation in program.operations:
        assert sum(f'"name":"{operation.name}"' in line and '"kind"' in line for line in lines) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plain: plain.pop("weights"), "weights"),
        (lambda plain: plain.update(extra=1), r"unknown key `\$.extra`"),
        (lambda plain: plain["operations"][3].update(extra=1), r"unknown key `\$.operations\[3\].extra`"),
        (lambda plain: plain["operations"][3].pop("inputs"), r"missing key `\$.operations\[3\].inputs`"),
        (lambda plain: plain["operations"][3].update(kind=7), r"\$.operations\[3\].kind"),
        (lambda plain: plain["buffers"][0].update(rows="many"), r"\$.buffers\[0\].rows"),
        (lambda plain: plain["buffers"][0].update(dtype="float8"), r"\$.buffers\[0\].dtype"),
        (lambda plain: plain["weights"][0].update(shape=[1.5, 2]), r"\$.weights\[0\].shape"),
        (lambda plain: plain.update(arena_bytes="1"), "arena_bytes"),
        (lambda plain: plain["operations"][0]["attributes"].update(scale=[1]), "attributes"),
    ],
)
def test_what_is_no_program_is_refused(
    program: Program, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    plain = json.loads(encode_program(program))
    change(plain)
    with pytest.raises(EngineFileError, match=message) as caught:
        decode_program(json.dumps(plain).encode(), "some/program.json")
    assert str(caught.value).startswith("some/program.json is not a program")


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"null", b"\xff\xfe", b"[" * 5000])
def test_what_is_no_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(EngineFileError, match="not a program"):
        decode_program(text, "x")
