"""Every way in which a program can be wrong is found before an executor sees it."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.tiny_checkpoint import write_tiny_model
from tests.support.tiny_packages import tiny_package
from tokenmill.errors import EngineFileError
from tokenmill.program.checks import check_program
from tokenmill.program.encoding import decode_program, encode_program
from tokenmill.program.operation_sizes import COLUMN_RULES
from tokenmill.program.program import OPERATIONS, Buffer, Operand, Operation, Program, Weight, WeightPart

pytestmark = pytest.mark.spec("D1")

LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return tiny_package(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")).program


def change_operation(program: Program, name: str, /, **changes: Any) -> Program:
    assert name in {operation.name for operation in program.operations}
    operations = [
        dataclasses.replace(operation, **changes) if operation.name == name else operation
        for operation in program.operations
    ]
    return dataclasses.replace(program, operations=tuple(operations))


def operation_of(program: Program, name: str) -> Operation:
    return next(operation for operation in program.operations if operation.name == name)


def change_weight(program: Program, name: str, **changes: Any) -> Program:
    weights = [dataclasses.replace(one, **changes) if one.name == name else one for one in program.weights]
    return dataclasses.replace(program, weights=tuple(weights))


def change_buffer(program: Program, name: str, **changes: Any) -> Program:
    assert name in {buffer.name for buffer in program.buffers}
    buffers = [dataclasses.replace(one, **changes) if one.name == name else one for one in program.buffers]
    return dataclasses.replace(program, buffers=tuple(buffers))


def change_attribute(name: str, **attributes: Any) -> Callable[[Program], Program]:
    def change(program: Program) -> Program:
        return change_operation(program, name, attributes={**operation_of(program, name).attributes, **attributes})

    return change


def change_input(name: str, role: str, operand: Operand) -> Callable[[Program], Program]:
    def change(program: Program) -> Program:
        return change_operation(program, name, inputs={**operation_of(program, name).inputs, role: operand})

    return change


def change_output(name: str, role: str, operand: Operand) -> Callable[[Program], Program]:
    return lambda program: change_operation(program, name, outputs={role: operand})


def without(items: Any, name: str) -> Any:
    return tuple(item for item in items if item.name != name)


def test_the_program_is_right(program: Program) -> None:
    check_program(program)


def test_every_kind_of_operation_has_a_rule() -> None:
    assert COLUMN_RULES.keys() == OPERATIONS.keys()


ATTENTION = f"{LAYER}.self_attn.attention"
GATE = f"{LAYER}.mlp.gate_proj"
NORM = f"{LAYER}.input_layernorm"
Q_ROPE = f"{LAYER}.self_attn.q_rope"
WRITE = f"{LAYER}.self_attn.write"

WRONG: dict[str, tuple[Callable[[Program], Program], str]] = {
    "unknown kind": (lambda p: change_operation(p, GATE, kind="linaer"), "no such kind.*Did you mean 'linear'"),
    "missing input": (lambda p: change_operation(p, GATE, inputs={}), "has no input 'x'"),
    "missing output": (lambda p: change_operation(p, GATE, outputs={}), "has no output 'y'"),
    "missing weight": (lambda p: change_operation(p, GATE, weights={}), "has no weight 'weight'"),
    "unknown role": (change_input(GATE, "z", Operand("positions", 0, 1)), "unknown input 'z'"),
    "missing attribute": (lambda p: change_operation(p, NORM, attributes={}), "has no attribute 'eps'"),
    "unknown attribute": (change_attribute(NORM, beta=1.0), "unknown attribute 'beta'"),
    "dangling weight": (
        lambda p: change_operation(p, GATE, weights={"weight": "nothing"}), "'nothing' is not a weight"
    ),
    "dangling buffer": (change_input(GATE, "x", Operand("nothing", 0, 32)), "'nothing' is not a buffer"),
    "columns outside": (change_input(GATE, "x", Operand(f"{NORM}.y", 16, 32)), "columns 16 to 47 .*which has 32"),
    "negative column": (change_input(GATE, "x", Operand(f"{NORM}.y", -1, 32)), "columns -1"),
    "no columns": (change_input(GATE, "x", Operand(f"{NORM}.y", 0, 0)), "columns 0 to -1"),
    "wrong columns": (change_input(GATE, "x", Operand(f"{NORM}.y", 0, 16)), "16 columns instead of 32"),
    "read before written": (change_input(NORM, "x", Operand("model.norm.y", 0, 32)), "before anything was written"),
    "name twice": (lambda p: change_operation(p, GATE, name=NORM), f"two operations are called '{NORM}'"),
    "nothing writes the output": (
        lambda p: dataclasses.replace(p, operations=without(p.operations, "lm_head")), "no operation writes the output"
    ),
    "other rows": (change_input("lm_head", "x", Operand("model.norm.y", 0, 32)), "different numbers of rows"),
    "select the wrong way": (
        change_input("select", "row_index", Operand("positions", 0, 1)), "selects from tokens by tokens into rows"
    ),
    "integers": (change_input(NORM, "x", Operand("token_ids", 0, 1)), "'token_ids' is int32"),
    "head size": (change_attribute(Q_ROPE, head_dim=6), "no heads of 6"),
    "odd head size": (change_attribute(Q_ROPE, head_dim=0), "head_dim is 0"),
    "heads": (change_attribute(ATTENTION, num_heads=3), "3 query heads cannot share 2"),
    "heads of another size": (change_attribute(ATTENTION, num_heads=6), "32 columns instead of 48"),
    "cache never written": (change_attribute(ATTENTION, layer=1), "cache of layer 1, where 0 were written"),
    "cache of another size": (change_attribute(ATTENTION, num_kv_heads=1), "reads 8 columns .* where 16"),
    "cache written twice": (change_attribute("model.layers.1.self_attn.write", layer=0), "layer 0 is written twice"),
    "negative layer": (change_attribute(WRITE, layer=-1), "layer is -1"),
    "layer no number": (change_attribute(WRITE, layer=True), "layer is True"),
    "not a number": (change_attribute(NORM, eps=float("nan")), "eps is nan"),
    "text for a number": (change_attribute(NORM, eps="small"), "eps is 'small'"),
    "unknown activation": (change_attribute(f"{LAYER}.mlp.act", activation="relu"), "activation is 'relu'"),
    "no window": (change_attribute(ATTENTION, sliding_window=0), "sliding_window is 0"),
    "unknown format": (lambda p: change_weight(p, f"{GATE}.weight", format="q3_x"), "unknown format 'q3_x'"),
    "short block": (lambda p: change_weight(p, f"{GATE}.weight", format="q4_k"), "cannot be made of q4_k blocks"),
    "quantized norm": (lambda p: change_weight(p, f"{NORM}.weight", format="bfloat16"), "not plain float32"),
    "packed norm": (lambda p: change_weight(p, f"{NORM}.weight", layout="tiles"), "not plain float32"),
    "unknown transform": (lambda p: change_weight(p, f"{NORM}.weight", transform="square"), "transform 'square'"),
    "rows of parts": (
        lambda p: change_weight(p, f"{GATE}.weight", parts=(WeightPart(f"{GATE}.weight", 63),)), "63 rows instead of 64"
    ),
    "weight of another shape": (
        lambda p: change_weight(p, f"{NORM}.weight", shape=(31,), parts=()), r"shape \[31\] instead of \[32\]"
    ),
    "three dimensions": (lambda p: change_weight(p, f"{NORM}.weight", shape=(1, 1, 32)), r"shape \[1, 1, 32\]"),
    "vector for a matrix": (
        lambda p: change_weight(p, f"{GATE}.weight", shape=(64,)), r"shape \[64\] instead of two dimensions"
    ),
    "weight twice": (
        lambda p: dataclasses.replace(p, weights=(*p.weights, Weight(f"{GATE}.weight", (1,)))), "two weights are called"
    ),
    "buffer twice": (
        lambda p: dataclasses.replace(p, buffers=(*p.buffers, Buffer("logits", "rows", 1))), "two buffers are called"
    ),
    "empty buffer": (lambda p: change_buffer(p, f"{NORM}.y", columns=0), "is empty"),
    "offset outside": (lambda p: change_buffer(p, f"{NORM}.y", offset=1 << 20), "ends at byte 1048704"),
    "negative offset": (lambda p: change_buffer(p, f"{NORM}.y", offset=-64), "starts at byte -64"),
    "no offset": (lambda p: change_buffer(p, f"{NORM}.y", offset=None), "starts at byte None"),
    "negative arena": (lambda p: dataclasses.replace(p, arena_bytes=-1), "arena_bytes is -1"),
    "input missing": (lambda p: dataclasses.replace(p, inputs=p.inputs[:2]), "its inputs are"),
    "input of two columns": (
        lambda p: dataclasses.replace(p, inputs=(*p.inputs[:2], dataclasses.replace(p.inputs[2], columns=2))),
        "'row_index' is not one column",
    ),
    "output by tokens": (
        lambda p: dataclasses.replace(p, output=dataclasses.replace(p.output, rows="tokens")), "'logits' is not float32"
    ),
    "int8 into a norm": (lambda p: change_buffer(p, "embed.y", dtype="int8_group32"), "cannot be int8_group32"),
    "int8 out of a plain linear": (
        lambda p: change_buffer(p, f"{GATE}.y", dtype="int8_group32"), "cannot be int8_group32"
    ),
    "int8 read by two kinds": (
        lambda p: change_buffer(p, f"{LAYER}.mlp.multiply.y", dtype="int8_group32"), "cannot be int8_group32"
    ),
    "int32 written": (lambda p: change_buffer(p, f"{GATE}.y", dtype="int32"), "is int32"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(program: Program, name: str) -> None:
    change, message = WRONG[name]
    with pytest.raises(EngineFileError, match=message) as caught:
        check_program(change(program), "some/program.json")
    assert str(caught.value).startswith("some/program.json: ")


def test_a_norm_may_give_int8_and_nothing_but_a_linear_may_read_it(program: Program) -> None:
    quantized = change_buffer(program, f"{LAYER}.post_attention_layernorm.y", dtype="int8_group32")
    check_program(quantized)
    with pytest.raises(EngineFileError, match="only the x of a linear"):
        check_program(change_buffer(program, "model.norm.y", dtype="int8_group32"))


def test_buffers_must_fit_the_arena_at_the_largest_step(program: Program) -> None:
    check_program(program, max_tokens=128, max_rows=4)
    with pytest.raises(EngineFileError, match="of an arena of 1048576"):
        check_program(program, max_tokens=1 << 16, max_rows=4)
    last = max(program.buffers, key=lambda buffer: buffer.offset or 0)
    assert last.offset is not None
    tight = dataclasses.replace(program, arena_bytes=last.offset + 64 * 1024)
    check_program(tight, max_tokens=128)
    with pytest.raises(EngineFileError, match="ends at byte"):
        check_program(tight, max_tokens=512)


def test_memory_need_not_be_planned(program: Program) -> None:
    buffers = tuple(dataclasses.replace(buffer, offset=None) for buffer in program.buffers)
    check_program(dataclasses.replace(program, buffers=buffers, arena_bytes=0))


def test_gated_linear_and_fused_norm_of_heads() -> None:
    inputs = (Buffer("token_ids", "tokens", 1, "int32"), Buffer("positions", "tokens", 1, "int32"),
              Buffer("row_index", "rows", 1, "int32"))  # fmt: skip
    buffers = (Buffer("x", "tokens", 8), Buffer("q", "tokens", 8), Buffer("kv", "tokens", 8),
               Buffer("angles", "tokens", 4), Buffer("s", "rows", 8, "float32"))  # fmt: skip
    weights = (Weight("table", (9, 8)), Weight("f", (2,)), Weight("n", (4,)), Weight("head", (6, 8)))
    operations = (
        Operation("embedding", "e", {"token_ids": Operand("token_ids", 0, 1)}, {"y": Operand("x", 0, 8)},
                  {"table": "table"}, {"scale": 1.0}),
        Operation("rotation", "r", {"positions": Operand("positions", 0, 1)}, {"y": Operand("angles", 0, 4)},
                  {"frequencies": "f"}, {"factor": 1.0}),
        Operation("copy", "c", {"x": Operand("x", 0, 8)}, {"y": Operand("kv", 0, 8)}),
        Operation("rope_write_cache", "w",
                  {"query": Operand("x", 0, 8), "key": Operand("kv", 0, 4), "value": Operand("kv", 4, 4),
                   "rotation": Operand("angles", 0, 4)},
                  {"y": Operand("q", 0, 8)}, {"query_norm": "n", "key_norm": "n"},
                  {"layer": 0, "head_dim": 4, "eps": 1e-6}),
        Operation("select_rows", "s", {"x": Operand("q", 0, 8), "row_index": Operand("row_index", 0, 1)},
                  {"y": Operand("s", 0, 8)}),
        Operation("linear", "l", {"x": Operand("s", 0, 8)}, {"y": Operand("logits", 0, 3)}, {"weight": "head"},
                  {"activation": "silu"}),
    )  # fmt: skip
    program = Program(inputs, Buffer("logits", "rows", 3), buffers, weights, operations)
    check_program(program)
    with pytest.raises(EngineFileError, match="no attribute 'eps'"):
        check_program(change_operation(program, "w", attributes={"layer": 0, "head_dim": 4}))
    with pytest.raises(EngineFileError, match="cannot be halved"):
        check_program(change_weight(program, "head", shape=(7, 8)))


VALUES = (
    *(None, 0, 1, -1, 2, 7, 1 << 40, -(1 << 70), 1.5, "", "x", "tokens", "rows", "int32", "float32", "int8_group32"),
    *("q4_k", "linear", "add", True, [], {}, [1], {"a": 1}, "packed", "model.norm.weight", "logits"),
)


def test_random_changes_are_refused_or_another_right_program(program: Program) -> None:
    """With a right checksum, too, nothing in program.json ends in another error than the one that names the file."""
    plain, rng = json.loads(encode_program(program)), random.Random(0)
    places = list(entries(plain))
    num_refused = 0
    for _ in range(300):
        container, key = rng.choice(places)
        before = container[key]
        container[key] = rng.choice(VALUES)
        try:
            check_program(decode_program(json.dumps(plain).encode(), "x"), "x", max_tokens=64, max_rows=16)
        except EngineFileError as error:
            assert str(error).startswith("x")
            num_refused += 1
        finally:
            container[key] = before
    assert num_refused > 250


def entries(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: a list or object, and the index or key."""
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(entry, dict | list):
            yield from entries(entry)
