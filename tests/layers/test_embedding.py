from __future__ import annotations

import torch

from tokenmill.attention.reference import ReferenceAttention
from tokenmill.layers.context import LayerContext
from tokenmill.layers.embedding import LMHead, VocabParallelEmbedding
from tokenmill.layers.weights import finalize_weights, weight_targets


def context(dtype: torch.dtype = torch.float32) -> LayerContext:
    return LayerContext(dtype=dtype, device=torch.device("cpu"), backend=ReferenceAttention())


def test_a_tied_head_follows_the_embedding_and_leaves_it_its_rows() -> None:
    embedding = VocabParallelEmbedding(9, 4, context())
    head = LMHead(9, 4, tied_to=embedding, context=context())
    matrix = torch.randn(9, 4)
    weight_targets(embedding)["weight"].load(matrix)
    assert not weight_targets(head)
    hidden = torch.randn(3, 4)
    for _ in range(2):  # before and after packing
        torch.testing.assert_close(head(hidden), hidden @ matrix.T)
        assert torch.equal(embedding(torch.tensor([8, 0])), matrix[[8, 0]])
        finalize_weights(embedding)
        finalize_weights(head)


def test_logits_are_float32_and_soft_capped() -> None:
    head = LMHead(5, 4, tied_to=None, context=context(torch.bfloat16), soft_cap=2.0)
    weight_targets(head)["weight"].load(torch.eye(5, 4))
    finalize_weights(head)
    logits = head(torch.tensor([[1.0, -8.0, 0.5, 0.0]], dtype=torch.bfloat16))
    assert logits.dtype == torch.float32
    expected = 2.0 * torch.tanh(torch.tensor([[1.0, -8.0, 0.5, 0.0, 0.0]]) / 2.0)
    torch.testing.assert_close(logits, expected)


def test_no_rows() -> None:
    head = LMHead(5, 4, tied_to=None, context=context())
    head.get_parameter("weight").data.zero_()
    finalize_weights(head)
    assert head(torch.empty(0, 4)).shape == (0, 5)
