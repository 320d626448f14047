"""Imports go one way. The table is the arrows of docs/architecture.md; a module that is in no row fails the test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.source_tree import ROOT, Module, imports_of, loaded_by, package_modules

COMMON = ("config", "env", "errors", "outputs", "sampling_params", "strict_model", "telemetry.stats", "version")
PUBLIC = ("builder", "executor", "inspection", "llm", "llmapi", "telemetry", "tokenization")

# Unit -> what it may import besides itself and COMMON. A unit is a folder or a module; the most specific row wins, on
# both sides of an arrow: `kv_cache` as a target does not allow `kv_cache.tensors`.
ALLOWED: dict[str, tuple[str, ...]] = {
    # the public API and what uses it
    "": ("builder", "executor", "inspection", "llm", "llmapi", "runtime"),  # runtime: Session
    "cli": (*PUBLIC, "bench", "program", "server", ""),
    "server": (*PUBLIC, ""),
    "bench": (*PUBLIC, "models", "models.step_costs", "program", ""),
    "__main__": ("cli",),
    "llmapi": ("llm",),
    "llm": (
        "checkpoints",
        "executor",
        "executor.description",
        "inputs",
        "program",
        "progress",
        "tokenization",
    ),
    "inputs": ("engine.request", "models", "tokenization"),
    "inspection": (
        "attention",
        "attention.base",
        "builder",  # the program of the engine that a start would build
        "checkpoints",
        "executor.backend_choice",
        "executor.description",
        "executor.engine_source",
        "executor.program_factory",
        "models",
        "models.linear_kernels",
        "ops",  # what was measured on this GPU
        "ops.platform",
        "ops.product_choices",
        "program",
        "runtime",
        "tokenization",
    ),
    "progress": (),
    # requests
    "executor": (
        "checkpoints",
        "engine",
        "engine.interruption",
        "engine.request",
        "executor.description",
        "executor.engine_factory",
        "executor.engine_reading",
        "executor.engine_source",
        "inputs",
        "program",
        "telemetry",
        "tokenization",
    ),
    "executor.description": ("models", "runtime"),  # the numbers of a model and its memory plan; no torch in either
    "executor.engine_factory": (  # where an engine is put together from its parts; nothing else sees both halves
        "attention",
        "checkpoints",
        "engine",
        "executor.backend_choice",
        "executor.description",
        "executor.engine_source",
        "executor.program_factory",
        "executor.runner_factory",
        "executor.scheduling",
        "kv_cache",
        "kv_cache.tensors",
        "models",
        "program",
        "runtime",
    ),
    "executor.program_factory": (  # the same for built engines
        "attention",
        "engine",
        "executor.description",
        "executor.runner_factory",
        "executor.scheduling",
        "models",
        "program",
        "runtime",
        "sampling",
    ),
    "executor.runner_factory": (  # what both have in common
        "attention",
        "attention.base",
        "executor.description",
        "ops.platform",
        "runtime",
        "sampling",
    ),
    "executor.backend_choice": ("models",),
    "executor.engine_source": ("builder", "executor.description", "program"),  # engines are built here, or read
    "executor.engine_reading": ("ops", "program"),  # before torch is there
    "executor.scheduling": ("engine", "engine.plan", "executor.description", "kv_cache"),
    "tokenization": ("checkpoints",),
    "engine": ("engine.interruption", "engine.plan", "engine.request", "kv_cache"),
    "kv_cache": (),
    # tensors
    "runtime": (
        "attention",
        "attention.base",
        "checkpoints",
        "engine.interruption",
        "engine.plan",
        "kv_cache",
        "kv_cache.tensors",
        "layers",
        "models",
        "ops",
        "ops.platform",
        "parallel",
        "program",
        "quantization",
        "sampling",
    ),
    "engine.plan": ("engine.interruption",),  # what crosses the Runner seam
    "engine.interruption": (),  # a word that native code reads
    "builder": ("attention.base", "checkpoints", "layers", "models", "ops", "ops.platform", "program", "quantization"),
    "program": (),  # what crosses from the builder to the executors of programs
    "program.reference": ("attention", "attention.base", "ops", "program"),  # what each operation means
    "engine.request": (),  # what a caller asks for
    "kv_cache.tensors": ("attention.base", "ops"),
    "sampling": ("ops", "engine.plan"),
    "models": ("layers", "attention.base", "parallel", "quantization"),
    "models.step_costs": ("models", "program"),  # what a model's parts move and compute; no torch
    "models.linear_kernels": (  # before there is a GPU; no torch
        "models",
        "models.step_costs",
        "ops.linear_plan",
        "ops.product_choices",
    ),
    "layers": ("ops", "attention.base", "quantization", "parallel"),
    "attention": ("ops", "ops.platform", "attention.base"),
    "attention.base": (),
    "quantization": ("ops",),
    "parallel": (),
    "ops": ("ops.linear_plan", "ops.platform", "ops.product_choices"),
    "ops.platform": (),
    "ops.linear_plan": (),  # which kernel multiplies: pure arithmetic
    "ops.product_choices": (),  # which algorithm of a library does: a file; no torch
    "checkpoints": ("program",),  # the formats of encoded weights
    # used everywhere
    "telemetry": (),
    "telemetry.stats": (),
    "config": (),
    "env": (),
    "errors": (),
    "outputs": (),
    "sampling_params": (),
    "strict_model": (),
    "version": (),
}

# These units see nothing of ours but what is written here, COMMON included.
WITHOUT_COMMON: dict[str, tuple[str, ...]] = {
    "ops": ("env", "errors", "ops.linear_plan", "ops.platform", "ops.product_choices"),
    "ops.platform": ("errors",),
    "ops.linear_plan": (),
    "ops.product_choices": ("env",),
    "errors": (),
    "version": (),
    "env": ("errors",),
    "telemetry.stats": (),
    "outputs": (),
    "strict_model": ("errors",),
    "config": ("errors", "strict_model"),
    "sampling_params": ("errors", "strict_model"),
}

# Imports of our own modules inside functions, by module or folder: only with a reason that stays true.
LATE_OWN_IMPORTS: dict[str, str] = {
    "tokenmill.attention.select": "the Triton kernels load triton, which a model on a CPU does not need",
    "tokenmill.cli": "`--help` must not load torch: a command loads what it needs when it runs",
    "tokenmill.executor.engine_source": "an engine that was built before starts without the builder",
    "tokenmill.executor.executor": "`create` picks among classes that are derived from this module's",
    "tokenmill.executor.worker": "torch loads while a thread loads the tokenizer",
    "tokenmill.executor.__main__": "a process loads what its kind needs; postprocessing needs no engine",
    "tokenmill.ops": "the Triton kernels load triton, which only tensors on a GPU need",
    "tokenmill.builder.engine": "the CPU's kernels load llvmlite, which an engine for a GPU does not need",
    "tokenmill.runtime.warm_up": "the Triton kernels load triton, which only engines on a GPU need",
    "tokenmill.runtime.program_loading": "the CPU's kernels load llvmlite, which an engine on a GPU does not need",
    "tokenmill.checkpoints.base": "`open_checkpoint` picks among readers that are derived from this module's",
    "tokenmill.tokenization.chat_template": "the environment derives from jinja2's, which completions never need",
}

# Nothing here may load torch, by itself or through anything that it imports.
TORCH_FREE = ("engine", "kv_cache", "config", "env", "errors", "outputs", "sampling_params", "telemetry.stats", "")
TORCH_FREE_EXCEPT = ("tokenmill.kv_cache.tensors",)

HEAVY = ("torch", "transformers", "llvmlite", "triton", "fastapi", "gguf", "huggingface_hub")


def unit_of(name: str) -> str:
    """The row of ALLOWED that the module `name` falls under."""
    path = name.removeprefix("tokenmill").removeprefix(".")
    while path and path not in ALLOWED:
        path = path.rpartition(".")[0]
    assert path or name == "tokenmill", f"{name} is in no row of ALLOWED: give its folder one, and an arrow in the docs"
    return path


def may_import(source: str, target: str) -> bool:
    """Whether a module of unit `source` may import one of unit `target`."""
    if source == target:
        return True
    if source in WITHOUT_COMMON:
        return target in WITHOUT_COMMON[source]
    return target in COMMON or target in ALLOWED[source]


def violations(modules: dict[str, Module]) -> list[str]:
    """Every import of ours that goes against the table."""
    found = []
    for module in modules.values():
        source = unit_of(module.name)
        for imported in imports_of(module, modules):
            if imported.target.partition(".")[0] != "tokenmill":
                continue
            target = unit_of(imported.target)
            if not may_import(source, target):
                found.append(f"line {imported.line}: {module.name} imports {imported.target}")
            if imported.late and not any(f"{module.name}.".startswith(f"{name}.") for name in LATE_OWN_IMPORTS):
                found.append(f"line {imported.line}: {module.name} imports {imported.target} late")
    return found


def test_imports_follow_the_arrows() -> None:
    found = violations(package_modules())
    assert not found, "\n".join(["", *found])


def test_the_arrows_have_no_cycle() -> None:
    """Following the rows of the table never leads back: a later edit that closes a circle is refused."""
    finished: set[str] = set()

    def visit(unit: str, path: tuple[str, ...]) -> None:
        assert unit not in path, f"the table has a circle: {' -> '.join((*path, unit))}"
        if unit in finished:
            return
        for target in ALLOWED[unit]:
            visit(target, (*path, unit))
        finished.add(unit)

    for unit in ALLOWED:
        visit(unit, ())


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("ops/linear.py", "from tokenmill.config import LlmArgs", "tokenmill.ops.linear imports tokenmill.config"),
        ("engine/core.py", "from tokenmill import runtime", "tokenmill.engine.core imports tokenmill.runtime"),
        ("engine/core.py", "from ..runtime import runner", "tokenmill.engine.core imports tokenmill.runtime.runner"),
        ("models/llama.py", "import tokenmill.checkpoints", "tokenmill.models.llama imports tokenmill.checkpoints"),
        ("engine/core.py", "import tokenmill.kv_cache.tensors", "imports tokenmill.kv_cache.tensors"),
        ("llm.py", "def f():\n    import tokenmill.executor", "tokenmill.llm imports tokenmill.executor late"),
        (
            "layers/norm.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tokenmill.models import llama",
            "tokenmill.layers.norm imports tokenmill.models.llama",
        ),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    for name in ("__init__", "config", "llm", "kv_cache/tensors", "models/llama", "runtime/runner", file[:-3]):
        path = tmp_path / "tokenmill" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        (path.parent / "__init__.py").touch()
    (tmp_path / "tokenmill" / "executor.py").write_text("")
    (tmp_path / "tokenmill" / "checkpoints.py").write_text("")
    (tmp_path / "tokenmill" / file).write_text(text)
    found = violations(package_modules(tmp_path))
    assert len(found) == 1
    assert complaint in found[0]


def torch_free_modules() -> list[str]:
    """Names of the modules that must work without torch."""
    return [name for name in package_modules() if unit_of(name) in TORCH_FREE and name not in TORCH_FREE_EXCEPT]


@pytest.mark.parametrize("name", torch_free_modules())
def test_the_control_plane_imports_no_torch(name: str) -> None:
    chains = loaded_by(name, package_modules())
    found = [" -> ".join(chain) for target, chain in chains.items() if target.partition(".")[0] in HEAVY]
    assert found == []


def test_torch_is_found_through_other_modules(tmp_path: Path) -> None:
    package = tmp_path / "tokenmill"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "first.py").write_text("from tokenmill import second\n")
    (package / "second.py").write_text("try:\n    import torch.nn\nexcept ImportError:\n    pass\n")
    chains = loaded_by("tokenmill.first", package_modules(tmp_path))
    assert chains["torch"] == ("tokenmill.first", "tokenmill.second", "torch")


def modules_after(statement: str) -> set[str]:
    """Top-level names in `sys.modules` of a fresh interpreter after `statement`."""
    code = f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.spec("C4")
@pytest.mark.parametrize(
    "name",
    [
        "tokenmill",
        "tokenmill.engine.core",
        "tokenmill.llm",
        "tokenmill.executor.proxy",
        "tokenmill.executor.postproc_worker",
    ],
)
def test_a_fresh_interpreter_loads_no_torch(name: str) -> None:
    assert modules_after(f"import {name}").isdisjoint(HEAVY)


def test_a_fresh_interpreter_that_loads_torch_is_noticed() -> None:
    assert "torch" in modules_after("import tokenmill.attention.base")
