"""Kernel variants are measured once, the fastest is used, and results do not depend on which it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tokenmill import Engine
from tokenmill.builder.build import build
from tokenmill.builder.linear_tuning import linear_shapes, linear_tunables
from tokenmill.builder.tuning import ROUNDS, Tunable, measure, tune
from tokenmill.errors import EngineFileError
from tokenmill.ops.cpu.linear_int8 import LinearWeight, linear_variants
from tokenmill.ops.cpu.machine import machine_key
from tokenmill.program.timing_cache import TimingCache, common_timing_cache, linear_key
from tokenmill.runtime.kernel_choices import KernelChoices

pytestmark = pytest.mark.spec("D3")


class Clock:
    """A clock that variants move on by what they cost."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs: list[str] = []

    def __call__(self) -> float:
        return self.now

    def tunable(self, key: str, costs: dict[str, float]) -> Tunable:
        def prepare(variant: str) -> Callable[[], None]:
            def run() -> None:
                self.runs.append(variant)
                self.now += costs[variant]

            return run

        return Tunable(key, tuple(costs), prepare)


def test_every_variant_gets_as_many_turns_and_hopeless_ones_none() -> None:
    clock = Clock()
    times = measure(clock.tunable("k", {"a": 0.0015, "b": 0.0009, "c": 0.01}), clock)
    assert times == {"a": 1500.0, "b": 900.0, "c": 10000.0}
    assert clock.runs.count("c") == 4  # to warm up, and the first look
    assert clock.runs.count("a") == 4 + ROUNDS
    assert clock.runs.count("b") == 4 + 2 * ROUNDS
    turns = clock.runs[12:]
    assert turns == ["a", "b", "b"] * ROUNDS


def test_only_what_is_not_known_is_measured() -> None:
    clock = Clock()
    known = TimingCache()
    known.add("here", "first", {"a": 1.0, "b": 2.0})
    known.add("there", "second", {"a": 1.0, "b": 2.0})
    known.add("here", "third", {"a": 1.0})  # has a variant more by now
    tunables = [clock.tunable(key, {"a": 0.1, "b": 0.2}) for key in ("first", "second", "third")]
    alone = clock.tunable("fourth", {"a": 0.1})
    told: list[tuple[int, int]] = []
    report = tune([*tunables, alone], known, "here", lambda done, total: told.append((done, total)))
    assert (report.num_measured, report.num_reused) == (2, 1)
    assert report.cache.times.keys() == {"here"}
    assert report.cache.times["here"].keys() == {"first", "second", "third"}
    assert report.cache.known("here", "first") == {"a": 1.0, "b": 2.0}
    assert told == [(0, 3), (1, 3), (2, 3)]
    again = tune(tunables, report.cache, "here")
    assert (again.num_measured, again.num_reused) == (0, 3)


# ---- a real program --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("timings") / "timing.cache"


OPTIONS = {"device": "cpu", "quantization": "int8", "capture": "dispatch", "profiles": [1, 4], "num_threads": 1}


@pytest.fixture(scope="module")
def tuned(model_dir: Path, cache_path: Path) -> Engine:
    return build(model_dir, timing_cache=cache_path, **OPTIONS)


def test_all_shapes_of_the_program_are_measured(tuned: Engine) -> None:
    shapes = linear_shapes(tuned.program)
    assert {(shape.num_rows, shape.num_columns, shape.gated): count for shape, count in shapes.items()} == {
        (64, 32, False): 2, (32, 32, False): 2, (128, 32, True): 2, (32, 64, False): 2, (320, 32, False): 1,
    }  # fmt: skip
    assert [shape.num_rows for shape in shapes if shape.is_head] == [320]
    expected = {
        linear_key("int8_group32", shape.num_rows, shape.num_columns, shape.gated, num_tokens)
        for shape in shapes
        for num_tokens in (1, 4)
        if len(linear_variants(one_token=num_tokens == 1)) > 1
    }
    if not expected:
        pytest.skip("This CPU has one variant only.")
    content = tuned.files["timing.cache"]
    assert isinstance(content, bytes)
    times = TimingCache.decode(content, "x").times
    assert times.keys() == {machine_key(1)}
    assert times[machine_key(1)].keys() == expected
    assert tuned.config.report["kernels"] == {"measured": len(expected), "reused": 0}


def test_a_second_build_measures_nothing(tuned: Engine, model_dir: Path, cache_path: Path) -> None:
    again = build(model_dir, timing_cache=cache_path, **OPTIONS)
    assert again.config.report["kernels"] == {"measured": 0, "reused": tuned.config.report["kernels"]["measured"]}
    assert again.files["timing.cache"] == tuned.files["timing.cache"]
    assert TimingCache.load(cache_path).times.keys() == {machine_key(1)}
    assert machine_key(1) != machine_key(2)


def test_no_level_below_two_measures(model_dir: Path, tmp_path: Path) -> None:
    built = build(model_dir, timing_cache=tmp_path / "timing.cache", opt_level=1, **OPTIONS)
    assert "timing.cache" not in built.files
    assert built.config.report["kernels"] == {}
    assert not (tmp_path / "timing.cache").exists()


def test_a_damaged_cache_is_named(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    path.write_text("nonsense")
    with pytest.raises(EngineFileError, match=r"timing\.cache is not JSON") as caught:
        build(model_dir, timing_cache=path, **OPTIONS)
    assert caught.value.field == "timing_cache"
    with pytest.raises(EngineFileError, match="cannot be"):
        build(model_dir, timing_cache=tmp_path, **OPTIONS)


def test_measured_products_do_not_depend_on_the_variant(tuned: Engine) -> None:
    """Bit by bit, whatever the number of tokens: a choice changes nothing but time."""
    with linear_tunables(tuned.program, (1, 5, 23), 64, 1) as tunables:
        bench = tunables[0].prepare.__closure__
        assert bench is not None
        owner = next(cell.cell_contents for cell in bench if hasattr(cell.cell_contents, "pool"))
        for tunable in tunables:
            results = []
            for variant in tunable.variants:
                owner._y[:] = 0
                run = tunable.prepare(variant)
                run()
                results.append(owner._y.copy())
            assert any(result.any() for result in results)
            for result in results[1:]:
                assert np.array_equal(results[0], result), tunable.key


# ---- what executors choose -------------------------------------------------------------------------------------------

WEIGHT = LinearWeight(0, "q4_1", 64, 32)


@pytest.fixture
def names() -> Iterator[list[str]]:
    found = [variant.name for variant in linear_variants(one_token=False)]
    if len(found) < 2:
        pytest.skip("This CPU has one variant only.")
    yield found


def choices(times: dict[int, dict[str, float]], machine: str = "here") -> KernelChoices:
    cache = TimingCache()
    for num_tokens, entry in times.items():
        cache.add("here", linear_key("q4_1", 64, 32, False, num_tokens), entry)
    return KernelChoices(cache, machine, tuple(times))


def test_the_best_over_all_numbers_of_tokens_is_used(names: list[str]) -> None:
    slow_at_four = {name: 10.0 + index for index, name in enumerate(names)}
    fast_at_many = {name: 1000.0 / (1 + index) for index, name in enumerate(names)}
    found = choices({1: {}, 4: slow_at_four, 64: fast_at_many}).linear(WEIGHT, one_token=False)
    scores = {name: slow_at_four[name] / 10.0 + fast_at_many[name] / min(fast_at_many.values()) for name in names}
    assert found is not None
    assert found.name == min(scores, key=lambda name: scores[name])


def test_the_usual_variant_stays_where_another_is_hardly_faster(names: list[str]) -> None:
    hardly = dict.fromkeys(names, 100.0) | {names[1]: 99.0}
    clearly = dict.fromkeys(names, 100.0) | {names[1]: 90.0}
    found = [choices({4: times}).linear(WEIGHT, one_token=False) for times in (hardly, clearly)]
    assert [one.name for one in found if one is not None] == names[:2]


def test_what_was_measured_elsewhere_or_for_another_shape_is_not_used(names: list[str]) -> None:
    times = {4: dict.fromkeys(names, 100.0) | {names[1]: 1.0}}
    assert choices(times, "there").linear(WEIGHT, one_token=False) is None
    assert choices(times).linear(LinearWeight(0, "q4_1", 128, 32), one_token=False) is None
    assert choices(times).linear(LinearWeight(0, "q4_1", 64, 32, gated=True), one_token=False) is None
    assert choices(times).linear(WEIGHT, one_token=True) is None
    assert choices({4: {"gone": 1.0}}).linear(WEIGHT, one_token=False) is None
    assert KernelChoices().linear(WEIGHT, one_token=False) is None


def test_an_engine_brings_its_times_along(tuned: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    if "timing.cache" not in tuned.files:
        pytest.skip("This CPU has one variant only.")
    loaded = Engine.load(tuned.save(tmp_path / "engine"))
    weight = LinearWeight(0, "int8_group32", 64, 32)
    for engine in (tuned, loaded):
        assert KernelChoices.of(engine, 1).linear(weight, one_token=False) is not None
        assert KernelChoices.of(engine, 7).linear(weight, one_token=False) is None
    assert [record.message.count("7 threads") for record in caplog.records if "measured on" in record.message] == [1, 1]


def test_an_engine_without_times_uses_those_of_other_builds_here(
    tuned: Engine, model_dir: Path, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the engine that `LLM(model)` builds at load."""
    untuned = build(model_dir, opt_level=1, **OPTIONS)
    shape = next(shape for shape in linear_shapes(tuned.program) if not shape.is_head)
    weight = LinearWeight(0, shape.format, shape.num_rows, shape.num_columns, shape.gated)
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    assert KernelChoices.of(untuned, 1).linear(weight, one_token=False) is None
    common_timing_cache().write_bytes(cache_path.read_bytes())
    expected = KernelChoices.of(tuned, 1).linear(weight, one_token=False)
    assert expected is not None
    assert KernelChoices.of(untuned, 1).linear(weight, one_token=False) == expected
    assert KernelChoices.of(untuned, 7).linear(weight, one_token=False) is None
    common_timing_cache().write_text("damaged")
    assert KernelChoices.of(untuned, 1).linear(weight, one_token=False) is None
