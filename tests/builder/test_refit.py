"""New weights in an engine make it the engine of the other checkpoint; what does not fit is refused by tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints.gguf_files import tiny_model, write_model
from tests.support.changed_checkpoints import EXPECTED, ROWS, changed_checkpoint
from tokenmill.builder.build import build
from tokenmill.builder.engine import Engine
from tokenmill.errors import CheckpointError

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
