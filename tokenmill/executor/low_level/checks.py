"""What the low-level types check alike: token ids from lists and arrays, and names that are known but not supported."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any, ClassVar

from tokenmill.errors import InvalidParameterError, UnsupportedFeatureError
from tokenmill.sampling_params import MAX_COUNT
from tokenmill.strict_model import StrictModel


class CompatibleModel(StrictModel):
    """A configuration that knows more of TensorRT-LLM's names than it supports.

    Raises:
        UnsupportedFeatureError: one of `not_yet` is given and not off (None or False).
    """

    not_yet: ClassVar[frozenset[str]] = frozenset()
    """Names of TensorRT-LLM's that are known and refused, unless they are off."""

    def __init__(self, **values: Any) -> None:
        for name in self.not_yet.intersection(values):
            value = values.pop(name)
            if value is not None and value is not False:
                raise UnsupportedFeatureError(
                    f"{type(self).__name__}.{name} is not supported by this version.",
                    field=name,
                    remedy="Leave it out.",
                )
        super().__init__(**values)


def token_ids_of(field: str) -> Callable[[Any], tuple[int, ...]]:
    """A validator for `field`: a list, a tuple or a one-dimensional array of token ids becomes a tuple of int."""
    return lambda value: as_token_ids(value, field)


def words_of(field: str) -> Callable[[Any], tuple[tuple[int, ...], ...]]:
    """A validator for `field`: a list of token sequences, each as in `token_ids_of`; None is none."""
    return lambda value: _as_words(value, field)


def as_token_ids(value: Any, field: str, what: str | None = None) -> tuple[int, ...]:
    """Token ids as a tuple.

    Args:
        value: a list, tuple or one-dimensional array (NumPy's, or anything with `ndim` and `tolist`) of integers.
        field: named in errors.
        what: what `value` is, for the errors' text; None: the field.

    Raises:
        InvalidParameterError: it is something else, empty, or holds what is no token id.
    """
    what = field if what is None else what
    token_ids = _as_list(value, field, what)
    if not token_ids:
        raise InvalidParameterError(f"{what} is empty.", field=field, remedy="Give at least one token id.")
    if any(type(token_id) is not int for token_id in token_ids):
        token_ids = [_as_integer(token_id, field, what) for token_id in token_ids]
    if min(token_ids) < 0 or max(token_ids) > MAX_COUNT:
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id <= MAX_COUNT)
        raise InvalidParameterError(f"{what} holds {_shown(wrong)}, which is no token id.", field=field)
    return tuple(token_ids)


def _as_words(value: Any, field: str) -> tuple[tuple[int, ...], ...]:
    if value is None:
        return ()
    if getattr(value, "ndim", 2) != 2:
        raise InvalidParameterError(
            f"{field} has shape {tuple(value.shape)}; it must be a list of token sequences.", field=field
        )
    if not isinstance(value, (list, tuple)) and not hasattr(value, "ndim"):
        raise InvalidParameterError(
            f"{field} is of type {type(value).__name__}, not a list of token sequences.", field=field
        )
    return tuple(dict.fromkeys(as_token_ids(word, field, f"A word of {field}") for word in value))


def _as_list(value: Any, field: str, what: str) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    if hasattr(value, "ndim") and hasattr(value, "tolist"):
        if value.ndim != 1:
            raise InvalidParameterError(
                f"{what} has shape {tuple(value.shape)}; token ids must have one dimension.", field=field
            )
        token_ids = value.tolist()
        assert isinstance(token_ids, list)
        return token_ids
    raise InvalidParameterError(
        f"{what} is of type {type(value).__name__}, not a list or array of token ids.",
        field=field,
        remedy="Tokenize text first; LLM does so itself.",
    )


def _as_integer(value: Any, field: str, what: str) -> int:
    try:
        if not isinstance(value, bool):
            return index(value)
    except TypeError:
        pass
    raise InvalidParameterError(
        f"{what} holds a value of type {type(value).__name__}; token ids must be integers.",
        field=field,
        remedy="Convert an array with .astype(numpy.int32).",
    )


def _shown(value: int) -> str:
    """Python refuses to print integers of many digits."""
    return str(value) if value.bit_length() <= 64 else f"an integer of {value.bit_length()} bits"
