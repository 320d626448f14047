"""`Session`: named tensors in and out, shapes, checks, debug outputs, times; with kernels and with torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tiny_checkpoint import VOCAB_SIZE
from tests.support.tiny_models import random_tokens
from tokenmill.builder.build import build
from tokenmill.errors import InvalidParameterError, UnknownParameterError
from tokenmill.runtime.session import Session

pytestmark = pytest.mark.spec("C1", "D5")

DEBUG = "model.layers.1.mlp.down_proj"
HEAD = "lm_head"
"""Its result is the program's output."""


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Any:
    sizes = {"max_seq_len": 256, "max_batch_size": 4}
    return build(model_dir, device="cpu", capture="dispatch", debug_outputs=(DEBUG, HEAD), **sizes)


@pytest.fixture(scope="module", params=[True, False], ids=["kernels", "torch"])
def session(request: pytest.FixtureRequest, engine: Any) -> Session:
    return Session(engine, num_blocks=32, tokens_per_block=16, num_threads=1, use_kernels=request.param)


def step(token_ids: list[int], kv_len: int, blocks: list[int], rows: list[int]) -> dict[str, Any]:
    return {
        "token_ids": token_ids,
        "query_start": [0, len(token_ids)],
        "kv_lens": [kv_len],
        "block_tables": [blocks],
        "row_index": rows,
    }


def hf_model(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def test_steps_give_the_logits_of_transformers(session: Session, model_dir: Path) -> None:
    tokens = random_tokens(40, vocab_size=VOCAB_SIZE)
    with torch.inference_mode():
        expected = hf_model(model_dir)(torch.tensor([tokens])).logits[0].numpy()
    first = session.run(step(tokens[:37], 37, [5, 2, 9], [0, 20, 36]))
    assert first["logits"].shape == (3, VOCAB_SIZE)
    np.testing.assert_allclose(first["logits"], expected[[0, 20, 36]], atol=2e-4)
    # Two sequences: the first goes on, a second starts with what the first one has.
    mixed = session.run(
        {
            "token_ids": torch.tensor([tokens[37], *tokens[:5]]),
            "query_start": np.array([0, 1, 6]),
            "kv_lens": [38, 5],
            "block_tables": [[5, 2, 9], [7, 0, 0]],
            "row_index": [5, 0],
        }
    )
    np.testing.assert_allclose(mixed["logits"], expected[[4, 37]], atol=2e-4)
    session.copy_blocks([5, 2, 9], [11, 12, 13])
    copied = session.run(step([tokens[38]], 39, [11, 12, 13], [0]))
    np.testing.assert_allclose(copied["logits"], expected[[38]], atol=2e-4)


def test_debug_outputs_are_what_the_layer_gives(session: Session, model_dir: Path) -> None:
    tokens = random_tokens(9, vocab_size=VOCAB_SIZE)
    model, seen = hf_model(model_dir), {}
    # The fused operation adds the residual stream to what the layer's MLP gives: the decoder layer's output.
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: seen.update(out=output))
    with torch.inference_mode():
        model(torch.tensor([tokens]))
    output = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
    found = session.run(step(tokens, 9, [1], list(range(9))))
    assert set(found) == {"logits", DEBUG, HEAD}
    np.testing.assert_allclose(found[HEAD], found["logits"], atol=1e-5)
    np.testing.assert_allclose(
        found[DEBUG], output.reshape(-1, output.shape[-1]).numpy()[-len(found[DEBUG]) :], atol=2e-4
    )


def test_shapes_are_inferred(session: Session) -> None:
    shapes = {name: np.shape(value) for name, value in step([1, 2, 3], 3, [1, 2], [2]).items()}
    inferred = session.infer_shapes(shapes)
    found = session.run(step([1, 2, 3], 3, [1, 2], [2]))
    assert inferred == {name: value.shape for name, value in found.items()}
    assert [info.name for info in session.outputs] == list(inferred)


def test_times_cover_every_operation(session: Session, engine: Any) -> None:
    times = session.profile(step([1, 2, 3], 3, [1], [2]), num_runs=3)
    assert [(time.name, time.kind) for time in times] == [(one.name, one.kind) for one in engine.program.operations]
    assert all(time.seconds >= 0.0 for time in times)
    assert sum(time.seconds for time in times) > 0.0


GOOD = step([1, 2, 3], 3, [1, 2], [2])


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("token_ids", [1, VOCAB_SIZE, 3], "holds 1 to 320"),
        ("token_ids", [1.0, 2.0, 3.0], "not integers"),
        ("token_ids", [1, True, 3], "booleans"),
        ("token_ids", np.array([True, False, True]), "booleans"),
        ("token_ids", [1, np.True_, 3], "booleans"),
        ("token_ids", torch.tensor([True, False, True]), "booleans"),
        ("token_ids", [1, [2], 3], "no array"),
        ("token_ids", [[1, 2, 3]], "dimensions"),
        ("query_start", (False, 3), "booleans"),
        ("kv_lens", [np.array(True)], "booleans"),
        ("kv_lens", True, "booleans"),
        ("block_tables", [[1, 2], [True, 2]], "booleans"),
        ("block_tables", [[1, 2], [1]], "no array"),
        ("row_index", [True], "booleans"),
        ("positions", [0, True, 2], "booleans"),
        ("query_start", [0, 2], "does not cut"),
        ("query_start", [0, 1, 3], "shape"),
        ("kv_lens", [2], "at least the new tokens"),
        ("kv_lens", [33], "at most 32"),
        ("block_tables", [[1, 32]], "it may hold 0 to 31"),
        ("block_tables", [[1, -1]], "-1"),
        ("row_index", [3], "it may hold 0 to 2"),
        ("row_index", np.zeros(0, np.int64), "0 entries"),
        ("positions", [0, 1], "shape"),
    ],
)
def test_steps_that_do_not_fit_are_refused(session: Session, field: str, value: Any, complaint: str) -> None:
    with pytest.raises(InvalidParameterError, match=complaint) as caught:
        session.run({**GOOD, field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("shape", [(True,), [3.0], 3, "3", None, ((3,),)])
def test_shapes_are_lists_of_numbers(session: Session, shape: Any) -> None:
    shapes = {name: np.shape(value) for name, value in GOOD.items()}
    with pytest.raises(InvalidParameterError, match="no list of numbers") as caught:
        session.infer_shapes({**shapes, "token_ids": shape})
    assert caught.value.field == "token_ids"


@pytest.mark.parametrize(
    ("sources", "destinations", "field", "complaint"),
    [
        ([True], [2], "sources", "booleans"),
        ([3, 4], [5, False], "destinations", "booleans"),
        ([1.5], [2], "sources", "not integers"),
        (["1"], [2], "sources", "not integers"),
        ([[1, 2]], [[3, 4]], "sources", "dimensions"),
        ([1], [32], "destinations", "0 to 31"),
        ([1, 2], [3], "destinations", "one other block"),
        ([1], [1], "destinations", "one other block"),
    ],
)
def test_blocks_that_cannot_be_copied_are_refused(
    session: Session, sources: Any, destinations: Any, field: str, complaint: str
) -> None:
    with pytest.raises(InvalidParameterError, match=complaint) as caught:
        session.copy_blocks(sources, destinations)
    assert caught.value.field == field


def test_blocks_are_copied_from_lists_and_arrays(session: Session) -> None:
    session.copy_blocks([], [])
    first = session.run(step([1, 2, 3, 4], 4, [6], [3]))["logits"]
    session.copy_blocks(np.array([6]), (7,))
    session.run(step([9, 9, 9, 9], 4, [6], [3]))
    again = session.run(step([4], 4, [7], [0]))["logits"]
    np.testing.assert_allclose(again, first, atol=1e-4)


@pytest.mark.parametrize("number", [0, True, 2.0, "3"])
def test_the_number_of_runs_is_one_or_more(session: Session, number: Any) -> None:
    with pytest.raises(InvalidParameterError, match="num_runs") as caught:
        session.profile(GOOD, num_runs=number)
    assert caught.value.field == "num_runs"


@pytest.mark.parametrize("device", ["xyz", "", True, 0, 1.5])
def test_a_device_is_named(engine: Any, device: Any) -> None:
    with pytest.raises(InvalidParameterError, match="device is") as caught:
        Session(engine, device=device)
    assert caught.value.field == "device"


def test_names_are_checked(session: Session) -> None:
    with pytest.raises(UnknownParameterError, match="token_ids"):
        session.run({**GOOD, "tokenids": [1]})
    with pytest.raises(InvalidParameterError, match="'kv_lens' is missing"):
        session.run({name: value for name, value in GOOD.items() if name != "kv_lens"})


def test_longer_sequences_come_after_those_of_one_token(session: Session) -> None:
    with pytest.raises(InvalidParameterError, match="behind longer ones"):
        session.run(
            {
                "token_ids": [1, 2, 3],
                "query_start": [0, 2, 3],
                "kv_lens": [2, 1],
                "block_tables": [[1], [2]],
                "row_index": [0],
            }
        )


def test_a_session_starts_from_a_directory(engine: Any, tmp_path: Path) -> None:
    folder = engine.save(tmp_path / "engine")
    session = Session.from_engine_dir(folder, num_blocks=8, num_threads=1)
    expected = Session(engine, num_blocks=8, num_threads=1).run(GOOD)
    np.testing.assert_array_equal(session.run(GOOD)["logits"], expected["logits"])


@pytest.mark.parametrize("name", ["num_blocks", "tokens_per_block", "num_threads"])
@pytest.mark.parametrize("number", [0, -1, True, 1.5, "8"])
def test_sizes_are_numbers_of_one_or_more(engine: Any, name: str, number: Any) -> None:
    with pytest.raises(InvalidParameterError, match=f"{name} is") as caught:
        Session(engine, **{name: number})
    assert caught.value.field == name
