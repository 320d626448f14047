"""`Codec`: messages to bytes and back, with msgspec. Types that msgspec does not know get their plain form here.

A codec decodes to the types that it was made for and refuses everything else, so bytes from outside never decide what
is built. Called by `IpcQueue` and by whoever encodes a message ahead of time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from tokenmill.errors import ProtocolError, TokenmillError
from tokenmill.sampling_params import SamplingParams

Message = TypeVar("Message")


class Codec(Generic[Message]):
    """Encodes and decodes messages of one type, or of a union of tagged structs. Safe on any thread.

    Args:
        message_type: what `decode` gives.
    """

    def __init__(self, message_type: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_to_plain)
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(message_type, dec_hook=_from_plain)

    def encode(self, message: Message) -> bytes:
        """The message as bytes.

        Raises:
            ProtocolError: it holds something that has no form on the wire, such as half a surrogate pair.
        """
        try:
            return self._encoder.encode(message)
        except (TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"A {type(message).__name__} cannot be sent: {error}.") from error

    def decode(self, data: bytes | memoryview) -> Message:
        """The message that was encoded.

        Raises:
            ProtocolError: the bytes are partial, malformed or of another type.
        """
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, ValueError, TypeError, LookupError) as error:
            raise ProtocolError(f"A message of {len(data)} bytes cannot be read: {error}.") from error


def _to_plain(value: Any) -> Any:
    if isinstance(value, SamplingParams):
        return value.model_dump(exclude_defaults=True)
    if isinstance(value, TokenmillError):
        return value.to_dict()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} has no form on the wire")


def _from_plain(expected: type, value: Any) -> Any:
    if expected is SamplingParams:
        return SamplingParams(**value)
    if expected is TokenmillError:
        return TokenmillError.from_dict(value)
    if expected is Path:
        return Path(value)
    raise TypeError(f"a {expected.__name__} has no form on the wire")
