"""`engine_picture`: the picture of a built engine, with the times of its operations if they were measured.

An engine holds no graphs; its model is captured again, which takes milliseconds, and the passes of its build run on it.
Called by the build, and by `tokenmill inspect ENGINE --picture`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tokenmill.builder.capture import capture
from tokenmill.builder.graph import assign_formats
from tokenmill.builder.lowering import lower
from tokenmill.builder.pass_selection import disabled_passes, pass_target
from tokenmill.builder.passes import PassReport, run_passes
from tokenmill.builder.picture import DEFAULT_STEPS, graph_html
from tokenmill.config import BuildConfig
from tokenmill.errors import EngineFileError
from tokenmill.models.config import ModelConfig
from tokenmill.program.costs import StepSize
from tokenmill.program.engine_config import EngineConfig
from tokenmill.program.package import EnginePackage


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """What the operations of a step took.

    Args:
        size: of the step, of one sequence.
        times: microseconds of each operation by its name.
    """

    size: StepSize
    times: Mapping[str, float]


def engine_picture(engine: EnginePackage, measured: MeasuredStep | None = None) -> str:
    """The page.

    Args:
        engine: built by this version; its weights are not needed.
        measured: a step whose times are shown.

    Raises:
        EngineFileError: this version would compile the model to another program.
    """
    config = engine.config
    graph = capture(ModelConfig.from_hf(config.model.hf_config), dtype=getattr(torch, config.dtype), method="dispatch")
    formats = {
        part.name: weight.format for weight in engine.program.weights if len(weight.shape) > 1 for part in weight.parts
    }
    disabled = disabled_passes(BuildConfig(**config.build_config))
    after, reports = run_passes(
        assign_formats(graph, formats), disabled=disabled, target=pass_target(config.target.device)
    )
    found = [(one.name, one.kind) for one in lower(after).operations]
    if found != [(one.name, one.kind) for one in engine.program.operations]:
        raise EngineFileError(
            f"The engine was built by another version ({config.tokenmill_version}), which compiled the model in "
            "another way; its passes cannot be shown.",
            field="engine",
            remedy=f"Build it again: tokenmill build {config.model.name} -o DIRECTORY.",
        )
    return draw(config, reports, measured)


def draw(config: EngineConfig, reports: Sequence[PassReport], measured: MeasuredStep | None = None) -> str:
    """The page, out of what the passes did.

    Args:
        config: of the engine.
        reports: of its passes, at least one.
        measured: a step whose times are shown.
    """
    limits, report = config.limits, config.report
    weights = [f"{nbytes / 1e6:.1f} MB {name}" for name, nbytes in report["weight_bytes"].items()]
    facts = {
        "Weights": ", ".join(weights),
        "Memory of a step": f"{report['arena_bytes'] / 1e6:.2f} MB for {limits.max_num_tokens} tokens, "
        f"{report['arena_sum_bytes'] / 1e6:.0f} MB if every value had its own",
    }
    cache_nbytes = getattr(torch, config.kv_cache_dtype).itemsize
    steps = {label: replace(step, cache_nbytes=cache_nbytes) for label, step in DEFAULT_STEPS.items()}
    if measured is not None:
        tokens = "1 token" if measured.size.num_tokens == 1 else f"{measured.size.num_tokens:,} tokens"
        label = f"measured: {tokens}, {measured.size.context_len:,} cached"
        steps = {label: measured.size, **steps}
        time = f"{sum(measured.times.values()) / 1e3:.2f} ms, operation by operation"
        facts[f"Time of a step, {label}"] = time
    title = Path(config.model.name).name
    before, after = reports[0].before, reports[-1].after
    times = None if measured is None else measured.times
    return graph_html(title, before, after, reports, facts=facts, steps=steps, times=times)
