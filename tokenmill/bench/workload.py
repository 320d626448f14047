"""What a benchmark sends: synthetic requests of fixed lengths, or a data set in JSON Lines; and when it sends them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenmill.errors import InvalidParameterError, UnknownParameterError, did_you_mean


@dataclass(frozen=True, slots=True)
class BenchmarkRequest:
    """One request to send.

    Args:
        prompt: text, or token ids.
        output_len: tokens to generate.
        arrival: seconds after the start of the run at which it is due.
    """

    prompt: str | tuple[int, ...]
    output_len: int
    arrival: float = 0.0


def synthetic_requests(
    *,
    num_requests: int,
    input_len: int,
    output_len: int,
    vocab_size: int,
    special_token_ids: Iterable[int] = (),
    seed: int = 0,
) -> list[BenchmarkRequest]:
    """Requests of `input_len` random tokens each, none of them special.

    Args:
        vocab_size: tokens are drawn from 0 to `vocab_size - 1`.
        special_token_ids: tokens that are never drawn.
        seed: the same seed gives the same requests; the first requests do not depend on `num_requests`.

    Raises:
        InvalidParameterError: a count is below 1, or no token is left to draw from.
    """
    for name, value in (("num_requests", num_requests), ("input_len", input_len), ("output_len", output_len)):
        if value < 1:
            raise InvalidParameterError(f"{name} must be at least 1, got {value}.", field=name)
    allowed = np.setdiff1d(np.arange(vocab_size), np.fromiter(special_token_ids, dtype=np.int64))
    if not len(allowed):
        raise InvalidParameterError(f"A vocabulary of {vocab_size} has no ordinary tokens.", field="vocab_size")
    generator = np.random.default_rng(seed)
    return [
        BenchmarkRequest(tuple(generator.choice(allowed, size=input_len).tolist()), output_len)
        for _ in range(num_requests)
    ]


def read_dataset(path: Path, *, output_len: int, num_requests: int | None = None) -> list[BenchmarkRequest]:
    """Requests from a file with one JSON object a line: `prompt` (text) or `input_ids`, and `output_tokens`.

    Args:
        output_len: for lines without `output_tokens`.
        num_requests: how many to send; the file starts again when it is shorter. None: each line once.

    Raises:
        InvalidParameterError: the file cannot be read, is empty, or a line is wrong; the message has its number.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameterError(f"The data set {path} cannot be read: {error}.", field="dataset") from None
    requests = [
        _parse_line(line, f"{path}:{number}", output_len)
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]
    if not requests:
        raise InvalidParameterError(f"The data set {path} is empty.", field="dataset")
    if num_requests is None:
        return requests
    return [requests[index % len(requests)] for index in range(num_requests)]


def _parse_line(line: str, place: str, output_len: int) -> BenchmarkRequest:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidParameterError(f"{place}: not JSON: {error}.", field="dataset") from None
    if not isinstance(record, dict):
        raise InvalidParameterError(f"{place}: a line must be a JSON object.", field="dataset")
    given = [name for name in ("prompt", "input_ids") if name in record]
    if not given:
        remedy = did_you_mean(next(iter(record), ""), ("prompt", "input_ids"))
        raise UnknownParameterError(f"{place}: neither 'prompt' nor 'input_ids'.", field="prompt", remedy=remedy)
    if len(given) == 2:
        raise InvalidParameterError(f"{place}: both 'prompt' and 'input_ids'.", field="prompt", remedy="Keep one.")
    length = record.get("output_tokens", output_len)
    if not _is_count(length) or length < 1:
        raise InvalidParameterError(
            f"{place}: output_tokens must be at least 1, got {length!r}.", field="output_tokens"
        )
    prompt = record[given[0]]
    if given == ["prompt"]:
        if not isinstance(prompt, str) or not prompt:
            raise InvalidParameterError(f"{place}: prompt must be a text that is not empty.", field="prompt")
        return BenchmarkRequest(prompt, length)
    if not isinstance(prompt, list) or not prompt or not all(_is_count(token_id) for token_id in prompt):
        raise InvalidParameterError(f"{place}: input_ids must be a list of token ids.", field="input_ids")
    return BenchmarkRequest(tuple(prompt), length)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def with_poisson_arrivals(
    requests: Sequence[BenchmarkRequest], request_rate: float | None, *, seed: int = 0
) -> list[BenchmarkRequest]:
    """`requests`, due at the times of a Poisson process of `request_rate` requests a second; None: all at once.

    The first is due at 0; gaps are exponentially distributed with mean `1 / request_rate`.

    Raises:
        InvalidParameterError: the rate is not a positive number.
    """
    if request_rate is None:
        return list(requests)
    if not np.isfinite(request_rate) or request_rate <= 0:
        raise InvalidParameterError(f"request_rate must be above 0, got {request_rate}.", field="request_rate")
    gaps = np.random.default_rng(seed).exponential(1.0 / request_rate, size=len(requests))
    arrivals = np.cumsum(gaps) - gaps[0] if len(requests) else gaps
    return [
        BenchmarkRequest(request.prompt, request.output_len, float(arrival))
        for request, arrival in zip(requests, arrivals, strict=True)
    ]
