"""Streams one answer to the terminal, and lets Ctrl-C end the answer instead of the program.

The signal handler only writes a byte to a pipe; a thread reads it and aborts the request. So no lock of the engine is
ever taken, nor an exception raised, in the middle of somebody else's code.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenmill.executor.result import GenerationResult
    from tokenmill.outputs import FinishReason, RequestOutput

_STOP, _ABORT = b"s", b"a"


@dataclass(slots=True)
class Answer:
    """What came of a request.

    Args:
        text: all that was said, up to an interruption.
        finish_reason: why it ended.
        interrupted: whether Ctrl-C ended it.
        num_prompt_tokens, num_cached_tokens, num_tokens: of the prompt, found in the prefix cache, of the answer.
        time_to_first_token: seconds from the request to the first token; None when there was none.
        tokens_per_second: of the tokens after the first; None for fewer than two.
    """

    text: str
    finish_reason: FinishReason | None
    interrupted: bool
    num_prompt_tokens: int
    num_cached_tokens: int
    num_tokens: int
    time_to_first_token: float | None
    tokens_per_second: float | None

    def summary(self) -> str:
        """One line: tokens, time to first token, speed."""
        parts = [f"{self.num_prompt_tokens} prompt tokens"]
        if self.num_cached_tokens:
            parts[0] += f" ({self.num_cached_tokens} cached)"
        parts.append(f"{self.num_tokens} tokens")
        if self.time_to_first_token is not None:
            parts.append(f"first token after {self.time_to_first_token:.2f} s")
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:.1f} tokens/s")
        if self.interrupted:
            parts.append("interrupted")
        elif self.finish_reason == "length":
            parts.append("stopped at the length limit")
        return " · ".join(parts)


def stream_answer(result: GenerationResult, write: Callable[[str], None]) -> Answer:
    """Write the answer piece by piece until it ends, or until Ctrl-C.

    Args:
        result: of a streaming request.
        write: gets each new piece of text.

    Raises:
        TokenmillError: the request failed; what came before was written.
        KeyboardInterrupt: a second Ctrl-C, while the request was being aborted.
    """
    first_token_time: float | None = None
    last: RequestOutput | None = None
    with _interrupt_aborts(result) as interrupted:
        for output in result:
            if first_token_time is None and output.outputs[0].token_ids:
                first_token_time = time.monotonic()
            write(output.outputs[0].text_diff)
            last = output
    ended = time.monotonic()
    assert last is not None, "a request without an output"
    completion = last.outputs[0]
    speed = None
    if first_token_time is not None and len(completion.token_ids) > 1:
        speed = (len(completion.token_ids) - 1) / max(ended - first_token_time, 1e-9)
    return Answer(
        text=completion.text,
        finish_reason=completion.finish_reason,
        interrupted=interrupted.is_set(),
        num_prompt_tokens=len(last.prompt_token_ids),
        num_cached_tokens=last.metrics.num_cached_tokens,
        num_tokens=len(completion.token_ids),
        time_to_first_token=None if first_token_time is None else first_token_time - last.metrics.arrival_time,
        tokens_per_second=speed,
    )


@contextmanager
def _interrupt_aborts(result: GenerationResult) -> Iterator[threading.Event]:
    """Within the block the first Ctrl-C aborts `result` (and sets the event); a second one interrupts as usual."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    read_end, write_end = os.pipe()

    def wait_for_signal() -> None:
        if os.read(read_end, 1) == _ABORT:
            interrupted.set()
            result.abort()

    def on_interrupt(signal_number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, previous)
        os.write(write_end, _ABORT)

    thread = threading.Thread(target=wait_for_signal, name="tokenmill-interrupt", daemon=True)
    thread.start()
    previous = signal.getsignal(signal.SIGINT) or signal.default_int_handler
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
        os.write(write_end, _STOP)
        thread.join()
        os.close(read_end)
        os.close(write_end)
