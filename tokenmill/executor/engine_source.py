"""`open_engine`: the built engine of a model: from an engine directory, from the cache folder, or built now.

Engines that were built for a checkpoint are kept in tokenmill's cache folder, under a name made of the files' identity,
the build's arguments and the sources that the result depends on. They are written whole or not at all; the ones used
longest ago go when all together take more than `CACHE_BYTES`. Small ones are not kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from tokenmill.builder.memory_plan import plan_memory
from tokenmill.config import BuildConfig, LlmArgs
from tokenmill.env import read_environment
from tokenmill.errors import TokenmillError
from tokenmill.executor.description import EngineDescription
from tokenmill.program.engine_config import LimitsRecord, is_engine
from tokenmill.program.engine_writing import check_output, remove_unless_in_use
from tokenmill.program.package import EnginePackage
from tokenmill.version import __version__

logger = logging.getLogger(__name__)

CACHE_BYTES: Final = 16 << 30
"""Most bytes of cached engines."""

SMALLEST_CACHED: Final = 32 << 20
"""Bytes of weights below which an engine is built at every start: that takes no longer than to read it."""

_SIZES: Final = ("max_batch_size", "max_num_tokens", "max_input_len", "max_seq_len")
"""Arguments of a build that change the plan of its memory and nothing else."""

_MODEL_FILES: Final = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.gguf")


class EngineTarget(NamedTuple):
    """What an engine is for: a device (`cpu` or `cuda`), the largest sizes of steps, and the longest prompt, if it is
    less than what `max_seq_len` leaves."""

    device: str
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    max_input_len: int | None = None


def open_engine(
    args: LlmArgs, target: EngineTarget, on_progress: Callable[[str, int, int], None] | None = None
) -> EnginePackage:
    """The engine for `args`.

    Args:
        args: `args.model` is a local path.
        target: device and sizes that it shall serve.
        on_progress: told about a build.

    Raises:
        UserError: the model cannot be compiled.
    """
    path = Path(args.model)
    if is_engine(path):
        return EnginePackage.load(path)
    config = build_config(args, target)
    folder = _cache_folder() / _key(path, config)
    cached = _load(folder)
    if cached is not None:
        return resized(cached, target)
    from tokenmill.builder.build import build

    package: EnginePackage = build(path, config, on_progress=on_progress)
    _store(package, folder)
    return package


def saved_engine(args: LlmArgs, description: EngineDescription, path: Path) -> Path:
    """Write the engine that runs `args` to a directory of its own.

    Args:
        args: as for `open_engine`.
        description: of the running engine.
        path: where.

    Raises:
        InvalidParameterError: something else is there, or nothing can be written there.
    """
    check_output(path)
    device = description.device.partition(":")[0]
    target = EngineTarget(
        device,
        description.max_batch_size,
        description.max_num_tokens,
        description.max_seq_len,
        description.max_input_len,
    )
    return open_engine(args, target).save(path)


def build_config(args: LlmArgs, target: EngineTarget) -> BuildConfig:
    """How a model is built for `args`. A `dtype` that the caller named is the type of all weights; with `auto`, or if a
    `BuildConfig` names it, the weights of the checkpoint stay in their formats."""
    given = args.build_config or BuildConfig()
    quantization: Any = args.quantization or ("auto" if args.dtype == "auto" else "none")
    if args.quantization is None and {"dtype", "quantization"} & given.model_fields_set:
        quantization = given.quantization
    cache = args.kv_cache_config.dtype
    dtype: Any = args.dtype
    device: Any = target.device
    options: dict[str, Any] = {
        "capture": "dispatch",
        "picture": False,
        "opt_level": 1,  # kernels are measured by `tokenmill build`, not at every start
    }
    return BuildConfig(
        max_batch_size=target.max_batch_size,
        max_num_tokens=max(target.max_num_tokens, target.max_batch_size),
        max_input_len=_max_input_len(target),
        max_seq_len=target.max_seq_len,
        dtype=dtype,
        quantization=quantization,
        kv_cache_type=given.kv_cache_type,
        kv_cache_dtype=cache if cache in ("float32", "bfloat16") else "auto",
        device=device,
        num_threads=args.num_threads,
        **{**options, **given.options_of_engines()},
    )


def _max_input_len(target: EngineTarget) -> int:
    longest = target.max_seq_len - 1
    return longest if target.max_input_len is None else min(longest, target.max_input_len)


def resized(package: EnginePackage, target: EngineTarget) -> EnginePackage:
    """The same engine for steps of other sizes: its memory is planned again."""
    limits = LimitsRecord(
        max_batch_size=target.max_batch_size,
        max_num_tokens=max(target.max_num_tokens, target.max_batch_size),
        max_input_len=_max_input_len(target),
        max_seq_len=target.max_seq_len,
        max_beam_width=package.config.limits.max_beam_width,
    )
    if limits == package.config.limits:
        return package
    program = plan_memory(package.program, max_tokens=limits.max_num_tokens, max_rows=limits.max_num_rows)
    return dataclasses.replace(package, program=program, config=msgspec.structs.replace(package.config, limits=limits))


# ---- the cache -------------------------------------------------------------------------------------------------------


def _cache_folder() -> Path:
    return read_environment().cache_dir / "engines"


def _key(model: Path, config: BuildConfig) -> str:
    """Names an engine: everything that its bytes depend on but sizes."""
    files = [model] if model.is_file() else sorted(file for one in _MODEL_FILES for file in model.glob(one))
    found = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    arguments = config.model_dump(mode="json", exclude={*_SIZES, "num_threads"})
    text = json.dumps([__version__, _source_digest(), found, arguments], sort_keys=True)
    name = "".join(letter if letter.isalnum() else "-" for letter in model.stem)[:40]
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def _source_digest() -> str:
    """Of the sources that decide what an engine's bytes are: versions of a working copy all have the same number."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in ("builder", "program", "models", "layers"):
        for file in sorted((package / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    for name in ("packing.py", "layout.py"):
        digest.update((package / "ops" / "cpu" / name).read_bytes())
    return digest.hexdigest()


def _load(folder: Path) -> EnginePackage | None:
    """The cached engine; None if there is none that can be used."""
    if not is_engine(folder):
        return None
    try:
        package = EnginePackage.load(folder, verify=False)
        os.utime(folder)  # used now: it stays longest
    except (TokenmillError, OSError) as error:
        logger.warning("The cached engine at %s cannot be used and is built again: %s", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return package


def _store(package: EnginePackage, folder: Path) -> None:
    """Keep an engine, if it can be written; make room for it first."""
    if not SMALLEST_CACHED <= package.weight_nbytes <= CACHE_BYTES:
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _make_room(folder.parent, CACHE_BYTES - package.weight_nbytes)
        package.save(folder)
    except (TokenmillError, OSError) as error:
        logger.warning("The engine is not kept for the next start: %s", error)


def _make_room(parent: Path, num_bytes: int) -> None:
    """Remove what killed processes left, and the engines that were used longest ago until the others take at most so
    many bytes."""
    found = list(parent.iterdir())
    for unfinished in (one for one in found if one.name.startswith(".")):
        remove_unless_in_use(unfinished)
    engines = [one for one in found if is_engine(one) and not one.name.startswith(".")]
    engines.sort(key=lambda one: one.stat().st_mtime)
    sizes = [sum(file.stat().st_size for file in one.rglob("*") if file.is_file()) for one in engines]
    total = sum(sizes)
    for engine, size in zip(engines, sizes, strict=True):
        if total <= num_bytes:
            break
        shutil.rmtree(engine, ignore_errors=True)
        total -= size
