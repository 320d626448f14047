"""`StrictModel`: the base of every configuration and request that a user writes, and the checks of single values.

An unknown key is an `UnknownParameterError` with a did-you-mean, a bad value an `InvalidParameterError` that names the
field. Booleans are no numbers, here and wherever else numbers are taken.
"""

from __future__ import annotations

import math
import reprlib
from numbers import Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Final, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from tokenmill.errors import InvalidParameterError, UnknownParameterError, UserError, did_you_mean


class StrictModel(BaseModel):
    """A pydantic model whose errors are tokenmill's: unknown and invalid fields are named, with a remedy."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        revalidate_instances="always",  # a nested configuration is copied in, not shared with the caller
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    _number_fields: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        fields = cls.model_fields.items()
        cls._number_fields = frozenset(name for name, field in fields if _takes_numbers(field.annotation))

    def __init__(self, **values: Any) -> None:
        for name in values:
            if name not in type(self).model_fields:
                raise UnknownParameterError(
                    f"{type(self).__name__} has no parameter '{name}'.",
                    field=name,
                    remedy=did_you_mean(name, type(self).model_fields),
                )
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _invalid_parameter(type(self), error) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in type(self).model_fields:
            raise UnknownParameterError(
                f"{type(self).__name__} has no parameter '{name}'.",
                field=name,
                remedy=did_you_mean(name, type(self).model_fields),
            )
        before = dict(self.__dict__)
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            self.__dict__.update(before)  # pydantic checks fields against each other only after it has assigned
            raise _invalid_parameter(type(self), error) from None

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would take True for 1."""
        if info.field_name in cls._number_fields and holds_boolean(value):
            raise ValueError("Input should be a number, not a boolean")
        return value


def _takes_numbers(annotation: Any) -> bool:
    """Whether a type is int or float, or has one of them inside."""
    return annotation in (int, float) or any(map(_takes_numbers, get_args(annotation)))


def holds_boolean(value: Any) -> bool:
    """Whether it is a boolean, or a list or table with one inside, however deep."""
    if isinstance(value, dict):
        return holds_boolean([*value, *value.values()])
    if isinstance(value, _LISTS):
        one_of_each_type = {type(item): item for item in value}  # lists of token ids are long
        if not any(issubclass(kind, (dict, *_LISTS)) for kind in one_of_each_type):
            return any(map(is_boolean, one_of_each_type.values()))
        return any(map(holds_boolean, value))
    return is_boolean(value)


_LISTS: Final = (list, tuple, set, frozenset)


def is_boolean(value: Any) -> bool:
    """Whether it is a boolean of Python, NumPy or torch, or an array of them."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold, and no boolean."""
    try:
        return isinstance(value, Real) and not is_boolean(value) and math.isfinite(value)
    except OverflowError:
        return False


def _invalid_parameter(owner: type[BaseModel], error: ValidationError) -> UserError:
    errors = error.errors()
    of_one_field = [one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]]
    first = max(of_one_field, key=lambda one: len(one["loc"]))  # of the types that a field takes, what came furthest
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # raised by our own checks, here or in a nested configuration
        return cause
    location = _without_type(owner, first["loc"])
    field = location[0] if location else None
    value = f", got {shown(first['input'])}" if field and not isinstance(first["input"], dict) else ""
    message = first["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")  # as callers see it
    return InvalidParameterError(f"{owner.__name__}.{'.'.join(location)}: {message}{value}.", field=field)


def _without_type(owner: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Where a value stands, without the type that pydantic puts behind a field that takes several."""
    parts = [str(part) for part in location]
    field = owner.model_fields.get(parts[0]) if parts else None
    types = [] if field is None else [one for one in get_args(field.annotation) if one is not NoneType]
    takes_several = field is not None and get_origin(field.annotation) in (Union, UnionType) and len(types) > 1
    return parts[:1] + parts[2:] if takes_several else parts


def shown(value: Any) -> str:
    """An offending value for an error's text, of bounded length. Python refuses to print integers of many digits."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return reprlib.repr(value)
