"""New weights in an engine make it the engine of the other checkpoint; what does not fit is refused by tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints.gguf_files import tiny_model, write_model
from tests.support.changed_checkpoints import EXPECTED, ROWS, changed_checkpoint
from tokenmill.builder.build import build
from tokenmill.builder.engine import Engine
from tokenmill.builder.packing import pack_weight
from tokenmill.builder.weight_source import WeightSource
from tokenmill.checkpoints.base import open_checkpoint
from tokenmill.errors import CheckpointError
from tokenmill.models.config import ModelConfig
from tokenmill.runtime.session import Session

pytestmark = pytest.mark.spec("D6")


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Engine:
    return build(model_dir, **ROWS)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("stripped", [False, True])
def test_a_refitted_engine_is_the_engine_of_the_other_checkpoint(
    model_dir: Path, tmp_path: Path, device: str, stripped: bool
) -> None:
    options = {**ROWS, "device": device, "quantization": "int8", "opt_level": 1}
    other = changed_checkpoint(model_dir, tmp_path, "values")
    engine = build(model_dir, strip_weights=stripped, **options)
    if stripped:
        engine = Engine.load(engine.save(tmp_path / "engine"))
    refitted = engine.refit(other)
    refitted.check_runnable()
    expected = build(other, **options)
    assert refitted.program == expected.program
    assert refitted.weights.keys() == expected.weights.keys()
    for name, content in expected.weights.items():
        assert np.array_equal(refitted.weights[name][: content.nbytes], content), name


def test_a_stripped_engine_and_its_checkpoint_are_the_engine(model_dir: Path, engine: Engine) -> None:
    stripped = engine.strip()
    assert stripped.weight_nbytes < 1000 < engine.weight_nbytes
    again = stripped.refit(model_dir)
    for name, content in engine.weights.items():
        assert np.array_equal(again.weights[name], content), name


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_a_refit_that_does_not_fit_is_refused_by_tensor(
    model_dir: Path, engine: Engine, tmp_path: Path, damage: str
) -> None:
    with pytest.raises(CheckpointError, match=EXPECTED[damage]):
        engine.refit(changed_checkpoint(model_dir, tmp_path, damage))


def test_a_gguf_engine_takes_a_checkpoint_of_another_type(tmp_path: Path) -> None:
    """Weights keep the engine's formats: float values are encoded in them."""
    model = tiny_model("llama")
    write_model(tmp_path / "model.gguf", model, "Q8_0")
    engine = build(tmp_path / "model.gguf", **ROWS)
    model.save_pretrained(tmp_path / "model")
    refitted = engine.refit(tmp_path / "model")
    for name, content in engine.weights.items():
        assert np.array_equal(refitted.weights[name], content), name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_tied_embedding_is_kept_once_and_looked_up_packed(tmp_path: Path, kind: str) -> None:
    """The same logits as with the table's rows beside the packed head, also after a refit."""
    model = tiny_model("qwen2", tie_word_embeddings=True)
    write_model(tmp_path / "model.gguf", model, kind)
    options = {"capture": "dispatch", "picture": False, "opt_level": 1, "max_seq_len": 64}
    engine = build(tmp_path / "model.gguf", device="cpu", **options)
    (table,) = (weight for weight in engine.program.weights if "embed_tokens" in weight.name)
    assert (table.layout, table.format) == ("packed", kind.lower())
    users = {one.kind for one in engine.program.operations for name in one.weights.values() if name == table.name}
    assert users == {"embedding", "linear"}
    rows = replace(table, name="rows", layout="rows")
    contents = {**engine.weights, "rows": pack_weight(rows, weight_source(tmp_path / "model.gguf"))}
    operations = tuple(
        replace(one, weights={"table": "rows"}) if one.kind == "embedding" else one for one in engine.program.operations
    )
    apart = replace(engine.program, weights=(*engine.program.weights, rows), operations=operations)
    expected = first_logits(replace(engine, program=apart, weights=contents))
    assert np.array_equal(first_logits(engine), expected)
    assert np.array_equal(first_logits(engine.strip().refit(tmp_path / "model.gguf")), expected)


def weight_source(path: Path) -> WeightSource:
    checkpoint = open_checkpoint(path)
    return WeightSource(checkpoint, ModelConfig.from_hf(checkpoint.hf_config))


def first_logits(engine: Engine) -> Any:
    session = Session(engine, num_blocks=4, tokens_per_block=16, num_threads=1)
    step = {
        "token_ids": [1, 5, 9],
        "query_start": [0, 3],
        "kv_lens": [3],
        "block_tables": [[1]],
        "row_index": [0, 1, 2],
    }
    return session.run(step)["logits"]
