"""What `auto` means for one device and another."""

from __future__ import annotations

import pytest
import torch

from tokenmill.config import LlmArgs
from tokenmill.runtime.model_loader import resolve_max_num_tokens


@pytest.mark.parametrize(
    ("device", "arguments", "expected"),
    [
        ("cpu", {}, 512),  # a step of 2,048 tokens would take seconds
        ("cpu", {"enable_chunked_prefill": False}, 2048),  # a step holds a whole prompt
        ("cuda", {}, 2048),
        ("cpu", {"max_num_tokens": 77}, 77),
        ("cuda", {"max_num_tokens": 77}, 77),
    ],
)
def test_step_size(device: str, arguments: dict[str, int], expected: int) -> None:
    args = LlmArgs(model="none", **arguments)
    assert resolve_max_num_tokens(args, torch.device(device)) == expected
