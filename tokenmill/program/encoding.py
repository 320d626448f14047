"""`Program` to the JSON text of `program.json` and back.

Decoding is strict: types are checked, unknown and missing keys are errors, and `check_program` then checks every
reference and size. Called by `package.py`; the format is described in `docs/engine-format.md`.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from tokenmill.errors import EngineFileError
from tokenmill.program.program import Program

_REMEDY: Final = "Build the engine again with `tokenmill build`."


def encode_program(program: Program) -> bytes:
    """JSON text, one line for each buffer, weight and operation, so that two programs can be compared with `diff`."""
    plain: dict[str, Any] = msgspec.to_builtins(program)
    sections = [f"{_text(name)}: {_section(value)}" for name, value in plain.items()]
    return ("{\n" + ",\n".join(sections) + "\n}\n").encode()


def decode_program(text: bytes, source: str) -> Program:
    """The program that `encode_program` wrote.

    Args:
        text: the JSON text.
        source: name of the file, for errors.

    Raises:
        EngineFileError: the text is no JSON, or a key or type in it is not that of a program.
    """
    try:
        program = msgspec.json.decode(text, type=Program)
        unknown = _first_difference(msgspec.json.decode(text), msgspec.to_builtins(program), "")
    except (msgspec.DecodeError, RecursionError) as error:
        raise EngineFileError(f"{source} is not a program: {error}.", field="engine", remedy=_REMEDY) from None
    if unknown is not None:
        raise EngineFileError(f"{source} is not a program: {unknown}.", field="engine", remedy=_REMEDY)
    return program


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _section(value: object) -> str:
    if not isinstance(value, list | tuple) or not value:
        return _text(value)
    return "[\n" + ",\n".join(f"  {_text(entry)}" for entry in value) + "\n]"


def _first_difference(given: Any, understood: Any, path: str) -> str | None:
    """Where the text says something that the decoder left out (an unknown or repeated key); None if nowhere."""
    if isinstance(given, dict) and isinstance(understood, dict):
        for key in given:
            if key not in understood:
                return f"unknown key `${path}.{key}`"
        for key, value in understood.items():
            if key not in given:
                return f"missing key `${path}.{key}`"
            if (found := _first_difference(given[key], value, f"{path}.{key}")) is not None:
                return found
        return None
    if isinstance(given, list) and isinstance(understood, list | tuple):
        for index, pair in enumerate(zip(given, understood, strict=True)):
            if (found := _first_difference(*pair, f"{path}[{index}]")) is not None:
                return found
    return None
