"""`TokenizerSource`: the tokenizer of an `LLM`, for its own process and for the processes that turn tokens into text.

A worker process cannot be given an object, only a place to load from; and the caller's process loads its own copy while
workers start. Made by `LLM`, used by executors.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal

from tokenmill.executor.messages import TokenizerLocation
from tokenmill.tokenization import Tokenizer, load_tokenizer, wrap_tokenizer


class TokenizerSource:
    """Where a tokenizer comes from.

    Args:
        path: a directory or file to load from; None with `tokenizer`.
        mode: as `LlmArgs.tokenizer_mode`.
        tokenizer: an object that the user passed.
    """

    def __init__(
        self, path: Path | None = None, mode: Literal["auto", "slow"] = "auto", *, tokenizer: Any = None
    ) -> None:
        assert (path is None) != (tokenizer is None), "a path or an object"
        self._path = path
        self._mode = mode
        self._object = tokenizer
        self._loaded: Tokenizer | None = None
        self._lock = threading.Lock()

    def load(self) -> Tokenizer:
        """The tokenizer; loaded once, by whichever thread asks first.

        Raises:
            UserError: it cannot be loaded, or the object is no tokenizer.
        """
        with self._lock:
            if self._loaded is None:
                if self._path is not None:
                    self._loaded = load_tokenizer(self._path, mode=self._mode)
                else:
                    self._loaded = wrap_tokenizer(self._object)
            return self._loaded

    def locate(self, folder: Path) -> TokenizerLocation:
        """Where another process finds it; an object is saved into `folder` first.

        Raises:
            InvalidParameterError: the object cannot be saved.
        """
        if self._path is not None:
            return TokenizerLocation(self._path.absolute(), self._mode)
        target = folder / "tokenizer"
        target.mkdir(exist_ok=True)
        return TokenizerLocation(target, self.load().save(target))
