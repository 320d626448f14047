"""Fill a model's weights: from a checkpoint, or with random numbers.

Called by the runner when a model is loaded. Names and shapes of both sides are compared before the first byte is read,
so that a checkpoint of another model fails at once and with the whole picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, Protocol

import torch

from tokenmill.checkpoints.base import Checkpoint, LazyTensor
from tokenmill.checkpoints.stacks import take_apart
from tokenmill.errors import CheckpointError

_MAX_LISTED: Final = 5
_NORMAL_DTYPES: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DUMMY_STD: Final = 0.02  # the standard deviation that most published models were initialized with


class LoadTarget(Protocol):
    """Where one checkpoint tensor goes; `tokenmill.layers.weights.WeightTarget` is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape that the checkpoint tensor must have."""
        ...

    def load(self, tensor: torch.Tensor) -> None:
        """Take the tensor in, converting type and device."""
        ...


class DummyTarget(LoadTarget, Protocol):
    """A target whose memory can be written in place."""

    @property
    def destination(self) -> torch.Tensor:
        """The parameter, or the view of it that this target fills."""
        ...


ProgressCallback = Callable[[str, int, int], None]
"""Called after each tensor with its name, the values' bytes loaded so far, and the bytes of all."""


def load_weights(
    targets: Mapping[str, LoadTarget],
    checkpoint: Checkpoint,
    *,
    ignore: Sequence[re.Pattern[str]] = (),
    rename: Callable[[str], str] = str,
    unstack: Callable[[str], Sequence[str] | None] = lambda name: None,
    on_progress: ProgressCallback | None = None,
) -> None:
    """Load every tensor of `checkpoint` into the target of its name.

    Args:
        targets: every tensor that the model expects, by Hugging Face name.
        checkpoint: where they come from.
        ignore: full-match patterns of tensors that may lie in the checkpoint without a target, such as a copy of tied
            embeddings. A tensor with a target is loaded even if a pattern matches.
        rename: from the checkpoint's name of a tensor to the model's, before anything else looks at it.
        unstack: the model's names of the tensors that lie in a checkpoint tensor, after `rename`; None: it is just one.
        on_progress: told after each tensor.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape; or a file is damaged.
    """
    wanted: dict[str, LazyTensor] = {}
    unexpected: list[str] = []
    for name, tensor in named_tensors(checkpoint, rename, unstack):
        if name in wanted:
            raise CheckpointError(f"{checkpoint.path} holds the tensor '{tensor.name}' twice.", field="model")
        if name in targets:
            wanted[name] = tensor
        elif not any(pattern.fullmatch(name) for pattern in ignore):
            unexpected.append(f"{tensor.name} {list(tensor.shape)}")
    _check_match(targets, wanted, unexpected, checkpoint)
    total_bytes = sum(_num_bytes(tensor) for tensor in wanted.values())
    done_bytes = 0
    for name, tensor in wanted.items():
        targets[name].load(tensor.load())
        done_bytes += _num_bytes(tensor)
        if on_progress is not None:
            on_progress(name, done_bytes, total_bytes)


def named_tensors(
    checkpoint: Checkpoint, rename: Callable[[str], str], unstack: Callable[[str], Sequence[str] | None]
) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor of the checkpoint with the name that the model has for it; stacks are taken apart."""
    for tensor in checkpoint.tensors():
        name = rename(tensor.name)
        parts = unstack(name)
        if parts is None:
            yield name, tensor
        else:
            yield from ((part.name, part) for part in take_apart(tensor, parts))


def _num_bytes(tensor: LazyTensor) -> int:
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def _check_match(
    targets: Mapping[str, LoadTarget], wanted: Mapping[str, LazyTensor], unexpected: list[str], checkpoint: Checkpoint
) -> None:
    missing = [f"{name} {list(target.shape)}" for name, target in targets.items() if name not in wanted]
    mismatched = [
        f"{name} is {list(tensor.shape)}, expected {list(targets[name].shape)}"
        for name, tensor in wanted.items()
        if tuple(tensor.shape) != tuple(targets[name].shape)
    ]
    if not (missing or unexpected or mismatched):
        return
    parts = [
        _list("missing", missing),
        _list("unexpected", unexpected),
        _list("of another shape", mismatched),
    ]
    raise CheckpointError(
        f"{checkpoint.path} does not fit the model '{checkpoint.hf_config['model_type']}': "
        f"{'; '.join(part for part in parts if part)}.",
        field="model",
        remedy="Check that the weights and the configuration belong to the same model.",
    )


def _list(what: str, entries: list[str]) -> str:
    if not entries:
        return ""
    rest = f" and {len(entries) - _MAX_LISTED} more" if len(entries) > _MAX_LISTED else ""
    noun = "tensor" if len(entries) == 1 else "tensors"
    return f"{len(entries)} {noun} {what}: {', '.join(entries[:_MAX_LISTED])}{rest}"


def fill_dummy(targets: Mapping[str, DummyTarget], seed: int) -> None:
    """Random weights of a trained model's scale, made where they lie: the same for the same seed, device and targets.

    Matrices and biases are normal with standard deviation 0.02; norm weights are near 1, so that activations neither
    vanish nor grow from layer to layer.
    """
    generators: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for name, target in targets.items():
            destination = target.destination
            device = destination.device
            if device not in generators:
                generators[device] = torch.Generator(device=device).manual_seed(seed)
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            if destination.dtype in _NORMAL_DTYPES:
                destination.normal_(mean, _DUMMY_STD, generator=generators[device])
            else:  # torch draws no 8-bit floats: load bfloat16 ones, as from a checkpoint
                values = torch.empty(target.shape, dtype=torch.bfloat16, device=device)
                target.load(values.normal_(mean, _DUMMY_STD, generator=generators[device]))
