"""A profiled run of a tiny model: the timeline holds steps, phases and operations on one clock, the table adds up."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.tiny_checkpoint import write_tiny_model
from tokenmill import LLM, KvCacheConfig, SamplingParams
from tokenmill.bench.profile import MAX_OUTPUT_LEN, STEPS_PROCESS, Profile, run_profile
from tokenmill.bench.workload import BenchmarkRequest
from tokenmill.config import StatsConfig
from tokenmill.errors import InvalidParameterError


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Of three requests."""
    folder = tmp_path_factory.mktemp("profile")
    model = write_tiny_model(folder / "model")
    with LLM(
        model,
        backend="torch",
        dtype="float32",
        num_threads=1,
        max_seq_len=128,
        kv_cache_config=KvCacheConfig(max_tokens=1024, enable_block_reuse=False),
        stats_config=StatsConfig(iter_stats_max_iterations=1000),
    ) as llm:
        requests = [BenchmarkRequest((5, 6, 7 + index), 100 if index == 0 else 4) for index in range(3)]
        llm.generate([[5, 6]], SamplingParams(max_tokens=2), use_tqdm=False)
        return run_profile(llm, requests, folder / "timeline.json")


@pytest.fixture(scope="module")
def events(profile: Profile) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(profile.path.read_text("utf-8"))["traceEvents"]
    return found


@pytest.mark.spec("C6")
def test_steps_are_those_of_the_run(profile: Profile, events: list[dict[str, Any]]) -> None:
    assert sum(step.num_generated_tokens for step in profile.steps) == MAX_OUTPUT_LEN + 4 + 4
    assert sum(step.num_prompt_tokens for step in profile.steps) == 9
    spans = [event for event in events if event["pid"] == STEPS_PROCESS and event["ph"] == "X"]
    assert [span["args"]["step"] for span in spans] == [step.step for step in profile.steps]
    assert "prefill" in spans[0]["name"]
    assert spans[-1]["name"] == "1 decode"
    for track in (0, 1):  # spans of one track must not overlap, or they are drawn over each other
        own = [span for span in spans if span["tid"] == track]
        for before, after in itertools.pairwise(own):
            assert before["ts"] + before["dur"] <= after["ts"] + 1.0


def test_phases_lie_in_their_steps(profile: Profile, events: list[dict[str, Any]]) -> None:
    """The engine's clock and the profiler's agree."""
    steps = [event for event in events if event["pid"] == STEPS_PROCESS and event["ph"] == "X"]
    phases = [event for event in events if event.get("name") == "tokenmill: model"]
    assert len(phases) == len(steps)
    for step, phase in zip(steps, sorted(phases, key=lambda event: float(event["ts"])), strict=True):
        assert step["ts"] - 2e3 <= phase["ts"] <= phase["ts"] + phase["dur"] <= step["ts"] + step["dur"] + 2e3


def test_kernels_add_up(profile: Profile, events: list[dict[str, Any]]) -> None:
    assert profile.device == "cpu"
    assert sum(kernel.share for kernel in profile.kernels) == pytest.approx(1.0)
    seconds = [kernel.seconds for kernel in profile.kernels]
    assert seconds == sorted(seconds, reverse=True)
    assert sum(seconds) <= profile.seconds
    written = json.loads(profile.path.read_text("utf-8"))["kernels"]
    assert [kernel["name"] for kernel in written] == [kernel.name for kernel in profile.kernels]
    text = io.StringIO()
    profile.print(Console(width=140, file=text))
    assert f"{len(profile.steps)} steps" in text.getvalue()
    assert profile.kernels[0].name in text.getvalue()


def test_an_engine_in_another_process_is_refused(tmp_path: Path) -> None:
    class Elsewhere:
        class args:  # noqa: N801 - stands for an attribute
            num_replicas = 1

    with pytest.raises(InvalidParameterError, match="worker process") as error:
        run_profile(Elsewhere(), [], tmp_path / "t.json")  # type: ignore[arg-type]
    assert error.value.field == "profile"
