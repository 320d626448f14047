"""Which logits the sampling kernel takes."""

from __future__ import annotations

import pytest
import torch

from tokenmill.ops.sampling import can_sample


def test_on_a_cpu_the_steps_sample() -> None:
    assert not can_sample(torch.zeros(2, 8))


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_samples_rows() -> None:
    logits = torch.zeros(2, 8, device="cuda")
    assert can_sample(logits) and can_sample(logits[:, :5])
    assert not can_sample(logits[:, ::2])
