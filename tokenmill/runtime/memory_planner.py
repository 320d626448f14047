"""`plan_memory`: what a model and its cache will take, before anything is allocated. Pure arithmetic.

The engine sizes its cache by it, `tokenmill inspect` prints it without loading a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.config import KvCacheConfig
from tokenmill.errors import OutOfMemoryError
from tokenmill.models.config import ModelConfig
from tokenmill.runtime.step_sizes import MAX_CAPTURED_TOKENS

CPU_CACHE_SHARE = 0.25
"""Share of free memory that the cache takes on a CPU when the user sets no size: the machine runs other things too."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose.

    Args:
        weights: parameters in the type that the model runs in.
        kv_cache: all blocks of all layers.
        slots: tokens and block tables of the running sequences.
        activations: the largest tensors that live at the same time in the largest step, logits and sampling included.
        graphs: memory of their own that captured steps share, on a GPU.
        num_blocks: cache blocks, the reserved block 0 included.
        tokens_per_block: tokens in one block.
        kv_bytes_per_token: keys and values of one token, all layers.
        free: free memory that the plan was made for; None if unknown.
    """

    weights: int
    kv_cache: int
    slots: int
    activations: int
    num_blocks: int
    tokens_per_block: int
    kv_bytes_per_token: int
    free: int | None
    graphs: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.slots + self.activations + self.graphs

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache holds."""
        return (self.num_blocks - 1) * self.tokens_per_block


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """What the plan depends on besides the model.

    Args:
        weight_bytes: bytes of one parameter, and of one activation.
        cache_bytes: bytes of one cached number.
        max_batch_size: sequences at the same time.
        max_num_tokens: tokens of the largest step.
        max_seq_len: tokens of the longest sequence.
        is_cpu: whether the device's memory is the machine's.
        linear_bytes: bytes of one parameter of the linear layers and experts, if they are quantized.
    """

    weight_bytes: int
    cache_bytes: int
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    is_cpu: bool
    linear_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class MeasuredMemory:
    """Bytes found on the device, which take the place of predictions: the loaded weights, the largest step."""

    weights: int
    activations: int
    graphs: int = 0


def plan_memory(
    model: ModelConfig,
    request: MemoryRequest,
    kv_cache_config: KvCacheConfig,
    free: int | None,
    measured: MeasuredMemory | None = None,
) -> MemoryPlan:
    """Plan for `free` bytes of memory with nothing loaded yet.

    Args:
        free: bytes; None plans the cache that `max_batch_size` sequences of `max_seq_len` need.
        measured: what is known once the weights are loaded.

    Raises:
        OutOfMemoryError: not even one block fits beside the weights, or `max_tokens` does not.
    """
    block = kv_cache_config.tokens_per_block
    kv_bytes_per_token = model.kv_bytes_per_token(request.cache_bytes)
    weights = _weight_bytes(model, request)
    if request.is_cpu and model.tie_word_embeddings:  # the head's matrix is packed; the embedding keeps plain rows
        weights += model.vocab_size * model.hidden_size * request.weight_bytes
    slots = request.max_batch_size * (request.max_seq_len * 8 + -(-request.max_seq_len // block) * 4)
    activations, graphs = _activation_bytes(model, request), _graph_bytes(model, request)
    if measured is not None:
        weights, activations, graphs = measured.weights, measured.activations, measured.graphs
    fixed = weights + slots + activations + graphs
    num_blocks = _num_cache_blocks(request, kv_cache_config, None if free is None else free - fixed, kv_bytes_per_token)
    plan = MemoryPlan(
        weights=weights,
        kv_cache=num_blocks * block * kv_bytes_per_token,
        slots=slots,
        activations=activations,
        num_blocks=num_blocks,
        tokens_per_block=block,
        kv_bytes_per_token=kv_bytes_per_token,
        free=free,
        graphs=graphs,
    )
    if num_blocks < 2 or (free is not None and plan.total > free):
        raise OutOfMemoryError(
            f"The model needs {_gib(fixed)} and its cache {_gib(plan.kv_cache)}, but {_gib(free or 0)} are free.",
            field="kv_cache_config",
            remedy="Lower kv_cache_config.max_tokens, max_num_tokens or max_batch_size, or use a smaller model.",
        )
    return plan


def _weight_bytes(model: ModelConfig, request: MemoryRequest) -> int:
    """Of the whole model; embedding and output head are not quantized."""
    embeddings = (1 if model.tie_word_embeddings else 2) * model.vocab_size * model.hidden_size
    linear_bytes = request.weight_bytes if request.linear_bytes is None else request.linear_bytes
    return embeddings * request.weight_bytes + (model.num_parameters() - embeddings) * linear_bytes


def _num_cache_blocks(
    request: MemoryRequest, config: KvCacheConfig, available: int | None, kv_bytes_per_token: int
) -> int:
    """Blocks, the reserved one included: as many as the user said, else as many as can be used and fit."""
    block = config.tokens_per_block
    if config.max_tokens is not None:
        return -(-config.max_tokens // block) + 1
    usable = request.max_batch_size * -(-request.max_seq_len // block) + 1
    if available is None:
        return usable
    share = CPU_CACHE_SHARE if request.is_cpu else config.free_gpu_memory_fraction
    fitting = int(max(available, 0) * share) // (block * kv_bytes_per_token)
    return min(usable, fitting) if request.is_cpu else fitting


def _activation_bytes(model: ModelConfig, request: MemoryRequest) -> int:
    """The widest moment of a layer, and fp32 logits with two copies."""
    layer = request.max_num_tokens * _layer_width(model) * request.weight_bytes
    return layer + 3 * request.max_batch_size * model.vocab_size * 4


def _graph_bytes(model: ModelConfig, request: MemoryRequest) -> int:
    """The same of the largest captured step, whose graph has memory of its own; logits in the model's type."""
    if request.is_cpu:
        return 0
    num_tokens = max(min(request.max_num_tokens, MAX_CAPTURED_TOKENS), request.max_batch_size)
    return (num_tokens * _layer_width(model) + request.max_batch_size * model.vocab_size) * request.weight_bytes


def _layer_width(model: ModelConfig) -> int:
    """Numbers of a token at the widest moment of a layer: residual, its norm, gate and up, their product."""
    width = 2 * model.hidden_size + 3 * model.intermediate_size
    attention = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim * 2
    return max(width, 2 * model.hidden_size + attention)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
