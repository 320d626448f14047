"""The error tree: its docstring draws what exists, codes are unique, every error survives a trip as plain data."""

from __future__ import annotations

import copy
import json
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill import errors
from tokenmill.errors import ExecutorError, SystemFault, TokenmillError, UserError, did_you_mean

HTTP_STATUS = {
    "tokenmill_error": 500,
    "invalid_request": 400,
    "invalid_parameter": 400,
    "unknown_parameter": 400,
    "unsupported_feature": 400,
    "context_length_exceeded": 400,
    "request_too_large": 400,
    "all_tokens_banned": 400,
    "model_not_found": 404,
    "invalid_checkpoint": 400,
    "invalid_engine": 400,
    "executor_error": 503,
    "queue_full": 429,
    "rate_limit_exceeded": 429,
    "request_timeout": 504,
    "request_cancelled": 499,
    "executor_shutdown": 503,
    "worker_start_failed": 503,
    "worker_died": 503,
    "protocol_error": 500,
    "engine_error": 500,
    "invalid_logits": 500,
    "engine_stalled": 503,
    "system_fault": 500,
    "out_of_memory": 503,
    "device_fault": 503,
}


def all_errors() -> list[type[TokenmillError]]:
    """Every class of the tree that the module defines."""
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, TokenmillError)]
    return sorted(found, key=lambda error_class: error_class.__name__)


def drawn_tree() -> dict[str, str | None]:
    """Class -> parent, as drawn in the module's docstring by indentation."""
    assert errors.__doc__ is not None
    parents: dict[str, str | None] = {}
    open_classes: list[tuple[int, str]] = []
    for indent, name in re.findall(r"^( {4,})([A-Z]\w+)(?: {2,}.*)?$", errors.__doc__, flags=re.MULTILINE):
        while open_classes and open_classes[-1][0] >= len(indent):
            open_classes.pop()
        parents[name] = open_classes[-1][1] if open_classes else None
        open_classes.append((len(indent), name))
    return parents


@pytest.mark.spec("F1")
def test_the_docstring_draws_the_real_tree() -> None:
    real = {
        error_class.__name__: None if error_class is TokenmillError else error_class.__bases__[0].__name__
        for error_class in all_errors()
    }
    assert drawn_tree() == real
    assert len(real) == len(HTTP_STATUS)


@pytest.mark.spec("F1")
def test_codes_are_unique_and_map_to_http() -> None:
    codes = [error_class.code for error_class in all_errors()]
    assert len(codes) == len(set(codes))
    assert {error_class.code: error_class.http_status for error_class in all_errors()} == HTTP_STATUS


def test_every_class_sets_its_own_code() -> None:
    assert [error_class.__name__ for error_class in all_errors() if "code" not in vars(error_class)] == []


def test_families() -> None:
    """A caller's mistake is a ValueError and a 4xx; a failure of ours is neither."""
    for error_class in all_errors():
        is_user_error = issubclass(error_class, UserError)
        assert issubclass(error_class, ValueError) == is_user_error
        if is_user_error:
            assert 400 <= error_class.http_status < 500
        elif not issubclass(error_class, ExecutorError):
            assert error_class.http_status >= 500


optional_text = st.none() | st.text()


@pytest.mark.spec("F1")
@pytest.mark.parametrize("error_class", all_errors())
@given(message=st.text(), field=optional_text, remedy=optional_text)
def test_an_error_survives_every_trip(
    error_class: type[TokenmillError], message: str, field: str | None, remedy: str | None
) -> None:
    error = error_class(message, field=field, remedy=remedy)
    as_json = TokenmillError.from_dict(json.loads(json.dumps(error.to_dict())))
    for copied in (as_json, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(copied) is error_class
        assert copied.to_dict() == error.to_dict()
        assert str(copied) == str(error)


def test_unknown_code_becomes_the_base_error() -> None:
    error = TokenmillError.from_dict({"code": "from_a_newer_version", "message": "Something.", "field": "x"})
    assert type(error) is TokenmillError
    assert (error.message, error.field, error.remedy) == ("Something.", "x", None)


def test_the_text_ends_with_the_remedy() -> None:
    assert str(SystemFault("The disk is full.", remedy="Free some space.")) == "The disk is full. Free some space."
    assert str(SystemFault("The disk is full.")) == "The disk is full."


def test_did_you_mean_names_the_closest_or_all() -> None:
    assert did_you_mean("temperatur", ["top_p", "temperature"]) == "Did you mean 'temperature'?"
    assert did_you_mean("zzz", ["top_p", "temperature"]) == "Known names: temperature, top_p."
