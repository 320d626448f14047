"""Memory plans: no two buffers in use overlap, in-place results are where they may be, sizes are close to the bound."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.programs import ARCHITECTURES, captured, tiny_model
from tokenmill.builder.graph import assign_formats
from tokenmill.builder.lowering import lower
from tokenmill.builder.memory_plan import IN_PLACE, memory_report, plan_memory
from tokenmill.builder.passes import PASSES, Target, run_passes
from tokenmill.program.buffer_sizes import ALIGNMENT, buffer_nbytes
from tokenmill.program.program import Buffer, Operand, Operation, Program

PASS_NAMES = [one.name for one in PASSES]
MAX_TOKENS, MAX_ROWS = 96, 40


def lifetimes(program: Program) -> dict[str, tuple[int, int]]:
    """First and last operation that touches each buffer."""
    found: dict[str, tuple[int, int]] = {}
    for position, operation in enumerate(program.operations):
        for operand in (*operation.inputs.values(), *operation.outputs.values()):
            found[operand.buffer] = (found.get(operand.buffer, (position, 0))[0], position)
    return found


def assert_sound(program: Program) -> None:
    """Two buffers overlap only if one dies where the other is born, at one place, in an operation that allows it."""
    alive = lifetimes(program)
    spans = {}
    for buffer in program.buffers:
        assert buffer.offset is not None
        assert buffer.offset % ALIGNMENT == 0
        end = buffer.offset + buffer_nbytes(buffer, MAX_TOKENS, MAX_ROWS)
        assert end <= program.arena_bytes
        spans[buffer.name] = (buffer.offset, end)
    for one in program.buffers:
        for other in program.buffers:
            (first, last), (other_first, other_last) = alive[one.name], alive[other.name]
            (start, end), (other_start, other_end) = spans[one.name], spans[other.name]
            if one is other or last < other_first or other_last < first or end <= other_start or other_end <= start:
                continue
            if last > other_first:
                continue  # seen from the other side
            operation = program.operations[last]
            source, result = IN_PLACE[operation.kind]
            assert (last, start, end) == (other_first, other_start, other_end)
            assert operation.inputs[source].buffer == one.name
            assert operation.outputs[result].buffer == other.name


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("disabled", [[], PASS_NAMES], ids=["all_passes", "no_passes"])
def test_plans_of_models(name: str, disabled: list[str]) -> None:
    program = lower(run_passes(captured(tiny_model(name)), disabled=disabled)[0])
    assert_sound(plan_memory(program, max_tokens=MAX_TOKENS, max_rows=MAX_ROWS))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_peak_is_near_the_lower_bound_and_far_from_the_sum(name: str) -> None:
    program = lower(run_passes(captured(tiny_model(name)))[0])
    report = memory_report(program, max_tokens=MAX_TOKENS, max_rows=MAX_ROWS)
    assert report.lower_bound_bytes <= report.arena_bytes <= 1.1 * report.lower_bound_bytes
    assert report.arena_bytes < 0.4 * report.sum_bytes


def test_the_residual_stream_of_llama_stays_in_place() -> None:
    program = lower(run_passes(captured(tiny_model("llama")))[0])
    report = memory_report(program, max_tokens=MAX_TOKENS, max_rows=MAX_ROWS)
    assert report.num_in_place == 6  # both products of each of three layers; the stream's rows are selected in between
    planned = plan_memory(program, max_tokens=MAX_TOKENS, max_rows=MAX_ROWS)
    offsets = {buffer.name: buffer.offset for buffer in planned.buffers}
    streams = [operation for operation in planned.operations if "residual" in operation.inputs]
    assert all(
        offsets[operation.inputs["residual"].buffer] == offsets[operation.outputs["y"].buffer] for operation in streams
    )


def test_quantized_buffers_hold_values_scales_and_sums() -> None:
    buffer = Buffer("x", "tokens", 80, "int8_group32")
    assert buffer_nbytes(buffer, 16, 1) == 16 * 3 * (32 + 4 + 4)
    assert buffer_nbytes(buffer, 17, 1) == 32 * 3 * (32 + 4 + 4)
    assert buffer_nbytes(Buffer("x", "rows", 3), 16, 5) == 64
    assert buffer_nbytes(Buffer("x", 2, 40, "bfloat16"), 16, 5) == 192


def test_kept_buffers_are_not_overwritten() -> None:
    program = lower(run_passes(captured(tiny_model("llama")))[0])
    keep = [operation.outputs["y"].buffer for operation in program.operations[2:12:3]]
    planned = plan_memory(program, max_tokens=MAX_TOKENS, max_rows=MAX_ROWS, keep=keep)
    spans = {
        buffer.name: (buffer.offset, buffer.offset + buffer_nbytes(buffer, MAX_TOKENS, MAX_ROWS))
        for buffer in planned.buffers
        if buffer.offset is not None
    }
    alive = lifetimes(program)
    for kept in keep:
        start, end = spans[kept]
        later = [name for name, (first, _) in alive.items() if first > alive[kept][0] and name in spans]
        assert later
        assert all(spans[name][1] <= start or end <= spans[name][0] for name in later)
    report = memory_report(program, max_tokens=MAX_TOKENS, max_rows=MAX_ROWS, keep=keep)
    assert report.arena_bytes == planned.arena_bytes
    assert report.arena_bytes > plan_memory(program, max_tokens=MAX_TOKENS, max_rows=MAX_ROWS).arena_bytes


def test_sizes_follow_the_largest_step() -> None:
    graph = captured(tiny_model("llama"))
    graph = assign_formats(graph, {part.name: "q8_0" for one in graph.weights.values() for part in one.parts})
    program = lower(run_passes(graph, target=Target(frozenset({"q8_0"})))[0])
    small, large = (plan_memory(program, max_tokens=tokens, max_rows=16).arena_bytes for tokens in (64, 1024))
    assert 14 * small < large <= 16 * small


def test_a_value_that_is_read_later_is_not_overwritten() -> None:
    """`rope` could be in place, but its input has another reader."""
    columns = {name: Operand(name, 0, 8) for name in ("x", "y", "z", "out")}
    rotation = Operand("rotation", 0, 8)
    operations = (
        Operation("copy", "1", {"x": Operand("in", 0, 8)}, {"y": columns["x"]}),
        Operation("rope", "2", {"x": columns["x"], "rotation": rotation}, {"y": columns["y"]}, {}, {"head_dim": 8}),
        Operation("add", "3", {"a": columns["x"], "b": columns["y"]}, {"y": columns["z"]}),
        Operation("copy", "4", {"x": columns["z"]}, {"y": columns["out"]}),
    )
    buffers = tuple(Buffer(name, "tokens", 8) for name in ("x", "y", "z", "rotation"))
    program = Program((Buffer("in", "tokens", 8),), Buffer("out", "rows", 8), buffers, (), operations)
    assert_sound(plan_memory(program, max_tokens=MAX_TOKENS, max_rows=MAX_ROWS))
    assert memory_report(program, max_tokens=MAX_TOKENS, max_rows=MAX_ROWS).num_in_place == 0


@st.composite
def chains(draw: st.DrawFn) -> Program:
    """Programs of sums: each reads two earlier values."""
    names = ["v0", "v1"]
    operations = [Operation("copy", name, {"x": Operand("in", 0, 4)}, {"y": Operand(name, 0, 4)}) for name in names]
    widths = {name: draw(st.integers(4, 300)) for name in names}
    for index in range(2, draw(st.integers(3, 25))):
        name = f"v{index}"
        a, b = draw(st.sampled_from(names[-6:])), draw(st.sampled_from(names[-6:]))
        widths[name] = draw(st.integers(4, 300))
        inputs = {"a": Operand(a, 0, 4), "b": Operand(b, 0, 4)}
        operations.append(Operation("add", name, inputs, {"y": Operand(name, 0, 4)}))
        names.append(name)
    buffers = tuple(Buffer(name, draw(st.sampled_from(["tokens", "rows"])), widths[name]) for name in names)
    return Program((Buffer("in", "tokens", 4),), Buffer("out", "rows", 4), buffers, (), tuple(operations))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(program=chains())
def test_plans_of_random_programs(program: Program) -> None:
    assert_sound(plan_memory(program, max_tokens=MAX_TOKENS, max_rows=MAX_ROWS))
    report = memory_report(program, max_tokens=MAX_TOKENS, max_rows=MAX_ROWS)
    assert report.lower_bound_bytes <= report.arena_bytes <= report.sum_bytes
