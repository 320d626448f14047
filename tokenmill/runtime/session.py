"""`Session`: a built engine run on named tensors, for those who schedule themselves, debug or measure.

What to compute and which cache blocks to use is the caller's business; every step is checked before it runs. Needs
neither the model's code nor the builder. Named and shaped as TensorRT-LLM's Session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import numpy as np
import torch

from tokenmill.errors import InvalidParameterError, UnknownParameterError, did_you_mean
from tokenmill.program.package import EnginePackage
from tokenmill.runtime.program_executor import ProgramExecutor, Values
from tokenmill.runtime.program_loading import StepLimits, load_executor, load_torch_executor
from tokenmill.runtime.step_arrays import StepArrays
from tokenmill.strict_model import holds_boolean, is_boolean, shown

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

_REQUIRED: Final = ("token_ids", "query_start", "kv_lens", "block_tables", "row_index")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One named input or output. Sizes are numbers, or names of a step's sizes: tokens, sequences, rows, blocks."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    meaning: str


@dataclass(frozen=True, slots=True)
class OperationTime:
    """What one operation of a step took."""

    name: str
    kind: str
    seconds: float


class Session:
    """An engine with a paged cache of its own.

    Args:
        engine: what to run.
        device: where; None: what the engine was built for.
        num_blocks: cache blocks; block 0 is scratch memory, as everywhere in tokenmill.
        tokens_per_block: tokens in one block.
        num_threads: threads on a CPU; None: one for each core.
        use_kernels: on a CPU, the native kernels; without them operations run one by one with torch.

    Raises:
        EngineFileError: the engine has no weights.
        UnsupportedFeatureError: this machine has no kernels for it.
        InvalidParameterError: a number is no number of 1 or more, or there is no such device.
    """

    def __init__(
        self,
        engine: EnginePackage,
        *,
        device: str | None = None,
        num_blocks: int = 256,
        tokens_per_block: int = 32,
        num_threads: int | None = None,
        use_kernels: bool = True,
    ) -> None:
        for name, number in (("num_blocks", num_blocks), ("tokens_per_block", tokens_per_block)):
            _check_count(name, number)
        if num_threads is not None:
            _check_count("num_threads", num_threads)
        self.engine = engine
        self._num_blocks = num_blocks
        limits = engine.config.limits
        sizes = StepLimits(
            max_batch_size=limits.max_batch_size,
            max_num_tokens=limits.max_num_tokens,
            max_seq_len=limits.max_seq_len,
            num_blocks=num_blocks,
            tokens_per_block=tokens_per_block,
        )
        cache_dtype = getattr(torch, engine.config.kv_cache_dtype)
        target = _device(engine.config.target.device if device is None else device)
        self._executor: ProgramExecutor
        if target.type == "cpu" and use_kernels:
            self._executor = load_executor(engine, sizes, cache_dtype, num_threads=num_threads)
        else:
            self._executor = load_torch_executor(engine, sizes, cache_dtype, target)

    @classmethod
    def from_engine_dir(cls, path: str | Path, **options: Any) -> Self:
        """A session of the engine in a directory; `options` as for the class.

        Raises:
            EngineFileError: there is no engine, or it is damaged or for another machine.
        """
        return cls(EnginePackage.load(path), **options)

    # ---- names and shapes ------------------------------------------------------------------------------------

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """What `run` takes. `positions` may be left out: they follow from the others."""
        return (
            TensorInfo("token_ids", ("tokens",), "int32", "tokens of all sequences, one after the other"),
            TensorInfo("query_start", ("sequences + 1",), "int32", "where each sequence's tokens start, and the end"),
            TensorInfo("kv_lens", ("sequences",), "int32", "cached tokens of each sequence, this step's included"),
            TensorInfo("block_tables", ("sequences", "blocks"), "int32", "cache blocks of each sequence"),
            TensorInfo("row_index", ("rows",), "int32", "indices of the tokens whose logits are wanted"),
            TensorInfo("positions", ("tokens",), "int32", "position of each token in its sequence"),
        )

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """What `run` gives: the logits, and the debug outputs that the engine was built with."""
        program = self.engine.program
        buffers = {buffer.name: buffer for buffer in (*program.buffers, program.output)}
        kept = (
            TensorInfo(name, (buffers[buffer].rows, buffers[buffer].columns), "float32", f"result of {name}")
            for name, buffer in self.engine.config.debug_outputs.items()
        )
        logits = TensorInfo("logits", ("rows", program.output.columns), "float32", "scores of the next token")
        return (logits, *kept)

    def infer_shapes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs for inputs of these shapes.

        Raises:
            UserError: an input is missing, unknown, of the wrong shape or too large for the engine.
        """
        self._check_names(shapes)
        arrays, ranks = self._executor.arrays, {info.name: len(info.shape) for info in self.inputs}
        for name, shape in shapes.items():
            _check_shape(name, shape)
            if len(shape) != ranks[name]:
                raise _wrong(name, f"has {len(shape)} dimensions instead of {ranks[name]}")
        num_tokens, num_rows = shapes["token_ids"][0], shapes["row_index"][0]
        num_sequences = shapes["kv_lens"][0]
        limits = (
            ("token_ids", num_tokens, arrays.max_num_tokens),
            ("kv_lens", num_sequences, arrays.max_batch_size),
            ("row_index", num_rows, arrays.max_num_rows),
            ("block_tables", shapes["block_tables"][1], arrays.block_tables.shape[1]),
        )
        for name, size, limit in limits:
            if not 1 <= size <= limit:
                raise _wrong(name, f"has {size} entries; this engine takes 1 to {limit}")
        expected = {
            "query_start": (num_sequences + 1,),
            "block_tables": (num_sequences, shapes["block_tables"][1]),
            "positions": (num_tokens,),
        }
        for name, shape in expected.items():
            if name in shapes and tuple(shapes[name]) != shape:
                raise _wrong(name, f"has the shape {list(shapes[name])} instead of {list(shape)}")
        sizes = {"tokens": num_tokens, "rows": num_rows}
        return {
            info.name: tuple(sizes[size] if isinstance(size, str) else size for size in info.shape)
            for info in self.outputs
        }

    # ---- run -------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Values]:
        """Compute one step; its keys and values are in the cache afterwards.

        Args:
            inputs: by name (`inputs`): NumPy arrays, torch tensors or lists of integers. Sequences of one token first.

        Returns:
            By name (`outputs`), float32; copies.

        Raises:
            UserError: an input does not fit the engine or the others.
        """
        self._write(inputs)
        found = {"logits": self._executor.run().copy()}
        names = self.engine.config.debug_outputs
        if names:
            kept = self._executor.kept()
            found |= {name: kept[buffer] for name, buffer in names.items()}
        return found

    def profile(self, inputs: Mapping[str, Any], *, num_runs: int = 10) -> tuple[OperationTime, ...]:
        """Time of each operation of a step in the program's order: the median of `num_runs` after one to warm up.

        Args:
            inputs: as for `run`; the step is computed again and again.
            num_runs: how often.

        Raises:
            UserError: an input does not fit the engine or the others, or `num_runs` is no number of 1 or more.
        """
        _check_count("num_runs", num_runs)
        self._write(inputs)
        self._executor.run_timed()
        runs = [self._executor.run_timed() for _ in range(num_runs)]
        return tuple(
            OperationTime(operation.name, operation.kind, float(np.median([run[operation.name] for run in runs])))
            for operation in self.engine.program.operations
        )

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copy cache blocks in all layers.

        Raises:
            InvalidParameterError: a block is not there, or both a source and a destination.
        """
        found = []
        for name, given in (("sources", sources), ("destinations", destinations)):
            blocks = _integers(name, given) if len(given) else np.zeros(0, np.int64)
            if blocks.ndim != 1:
                raise _wrong(name, f"has {blocks.ndim} dimensions instead of 1")
            self._check_range(name, blocks, self._num_blocks)
            found.append(blocks.tolist())
        if len(found[0]) != len(found[1]) or set(found[0]) & set(found[1]):
            raise _wrong("destinations", "does not name one other block for each source")
        if found[0]:
            self._executor.copy_blocks(*found)

    # ---- checks ----------------------------------------------------------------------------------------------

    def _check_names(self, given: Mapping[str, Any]) -> None:
        known = [info.name for info in self.inputs]
        for name in given:
            if name not in known:
                raise UnknownParameterError(
                    f"A step has no input '{name}'.", field=name, remedy=did_you_mean(name, known)
                )
        for name in _REQUIRED:
            if name not in given:
                raise InvalidParameterError(f"The input '{name}' is missing.", field=name)

    def _check_range(self, name: str, values: Integers, end: int) -> None:
        if values.size and not (values.min() >= 0 and values.max() < end):
            raise _wrong(name, f"holds {int(values.min())} to {int(values.max())}; it may hold 0 to {end - 1}")

    def _write(self, inputs: Mapping[str, Any]) -> None:
        """Check the step and write it to the executor's arrays."""
        given = {name: _integers(name, value) for name, value in inputs.items()}
        self.infer_shapes({name: value.shape for name, value in given.items()})
        arrays = self._executor.arrays
        starts, kv_lens, tables = given["query_start"], given["kv_lens"], given["block_tables"]
        num_tokens, num_sequences = len(given["token_ids"]), len(kv_lens)
        lens = np.diff(starts)
        if starts[0] != 0 or starts[-1] != num_tokens or lens.min() < 1:
            raise _wrong("query_start", f"does not cut {num_tokens} tokens into sequences of one or more")
        num_decode = int(np.argmax(lens > 1)) if (lens > 1).any() else num_sequences
        if (lens[num_decode:] == 1).any():
            raise _wrong("query_start", "has sequences of one token behind longer ones")
        longest = tables.shape[1] * arrays.tokens_per_block
        if (kv_lens < lens).any() or kv_lens.max() > longest:
            raise _wrong("kv_lens", f"must be at least the new tokens of each sequence, and at most {longest}")
        self._check_range("token_ids", given["token_ids"], self.engine.program.output.columns)
        self._check_range("block_tables", tables, self._num_blocks)
        self._check_range("row_index", given["row_index"], num_tokens)
        positions = given.get("positions", np.arange(num_tokens) + (kv_lens - starts[1:]).repeat(lens))
        self._check_range("positions", positions, 1 << 31)
        arrays.num_decode = num_decode
        _store(arrays, given, positions)


def _store(arrays: StepArrays, given: Mapping[str, Integers], positions: Integers) -> None:
    num_tokens, num_sequences, num_rows = len(positions), len(given["kv_lens"]), len(given["row_index"])
    arrays.num_tokens, arrays.num_sequences, arrays.num_rows = num_tokens, num_sequences, num_rows
    arrays.token_ids[:num_tokens] = given["token_ids"]
    arrays.positions[:num_tokens] = positions
    arrays.query_start[: num_sequences + 1] = given["query_start"]
    arrays.kv_lens[:num_sequences] = given["kv_lens"]
    arrays.block_tables[:num_sequences, : given["block_tables"].shape[1]] = given["block_tables"]
    arrays.row_index[:num_rows] = given["row_index"]


def _integers(name: str, value: Any) -> Integers:
    if holds_boolean(value):  # in a list beside a number, numpy would take True for 1
        raise _wrong(name, "holds booleans, not integers")
    try:
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    except ValueError:  # rows of several lengths
        raise _wrong(name, "is no array") from None
    if array.dtype.kind not in "iu":
        raise _wrong(name, f"holds {array.dtype} values, not integers")
    return array.astype(np.int64)


def _wrong(name: str, what: str) -> InvalidParameterError:
    return InvalidParameterError(f"The input '{name}' {what}.", field=name)


def _check_shape(name: str, shape: Any) -> None:
    if holds_boolean(shape) or not (isinstance(shape, (list, tuple)) and all(isinstance(n, int) for n in shape)):
        raise _wrong(name, f"has the shape {shown(shape)}, which is no list of numbers")


def _device(device: Any) -> torch.device:
    try:
        if isinstance(device, (str, torch.device)):
            return torch.device(device)
    except RuntimeError:  # torch knows no such kind
        pass
    raise InvalidParameterError(f"device is {shown(device)}.", field="device", remedy="Use 'cpu', 'cuda' or 'cuda:1'.")


def _check_count(name: str, number: Any) -> None:
    if not isinstance(number, int) or is_boolean(number) or number < 1:
        raise InvalidParameterError(f"{name} is {shown(number)}.", field=name, remedy="Give 1 or more.")
