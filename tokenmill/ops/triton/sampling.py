"""Temperature, top-k, top-p, min-p and the draw of a token in one launch, without a sort. Called by `ops.sampling`.

One program a row passes over the row's logits: it finds the largest, then two bits of the smallest logit that top-k
keeps with each pass (how many are at least so large?), then likewise for top-p (what do they weigh?), and draws by
going through the vocabulary until the weights so far exceed the random number. Weights are summed as 64-bit integers,
so the order of summation does not matter (`tokenmill.sampling.exact` says why).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tokenmill.ops.sampling import SlotColumns
from tokenmill.ops.triton.launch import is_interpreted

BLOCK = 4096
"""Tokens of a row in one step of a pass."""
NUM_WARPS = 16
LOWEST = tl.constexpr(-60.0)
"""As `tokenmill.sampling.exact`: e**-60 is below the smallest unit of weights."""
GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _load(row: tl.tensor, start: tl.tensor, vocab_size: int, block: tl.constexpr) -> tl.tensor:
    """Logits from token `start` on in float32; -inf beyond the vocabulary."""
    tokens = start + tl.arange(0, block)
    return tl.load(row + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)


@triton.jit
def _keys(logits: tl.tensor, key_bits: tl.constexpr) -> tl.tensor:
    """Unsigned integers of `key_bits` bits in the order of the logits: what their type has no bits for is left out."""
    bits = logits.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ -0x80000000
    return ordered.to(tl.uint32, bitcast=True).to(tl.int64) >> (32 - key_bits)


@triton.jit
def _weights(logits: tl.tensor, largest: tl.tensor, inverse: tl.tensor, unit: tl.constexpr) -> tl.tensor:
    """exp((logit - largest) / temperature) in whole units."""
    scaled = tl.maximum((logits - largest) * inverse, LOWEST)
    return (tl.exp(scaled) * unit).to(tl.int64)


@triton.jit
def _measures(
    row: tl.tensor,
    vocab_size: int,
    candidate: tl.tensor,
    step: tl.tensor,
    from_key: tl.tensor,
    largest: tl.tensor,
    inverse: tl.tensor,
    unit: tl.constexpr,
    counts: tl.constexpr,
    key_bits: tl.constexpr,
    block: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """How many tokens, or what weight, have keys from `candidate`, `candidate + step` and `candidate + 2 step` on."""
    zeros = tl.zeros([block], tl.int64)
    first, second, third = zeros, zeros, zeros
    for start in range(0, vocab_size, block):
        logits = _load(row, start, vocab_size, block)
        keys = _keys(logits, key_bits)
        measure = zeros + 1
        if not counts:
            measure = tl.where(keys >= from_key, _weights(logits, largest, inverse, unit), 0)
        measure = tl.where(start + tl.arange(0, block) < vocab_size, measure, 0)
        first += tl.where(keys >= candidate, measure, 0)
        second += tl.where(keys >= candidate + step, measure, 0)
        third += tl.where(keys >= candidate + 2 * step, measure, 0)
    return tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0)


@triton.jit
def _largest_key(
    row: tl.tensor,
    vocab_size: int,
    target: tl.tensor,
    from_key: tl.tensor,
    largest: tl.tensor,
    inverse: tl.tensor,
    unit: tl.constexpr,
    counts: tl.constexpr,
    key_bits: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """The largest key for which the tokens with it or a larger one measure at least `target`."""
    key = from_key * 0
    for digit in range(key_bits // 2):
        step = (from_key * 0 + 1) << (key_bits - 2 - 2 * digit)
        first, second, third = _measures(
            row, vocab_size, key + step, step, from_key, largest, inverse, unit, counts, key_bits, block
        )
        reached = (first >= target).to(tl.int64) + (second >= target).to(tl.int64) + (third >= target).to(tl.int64)
        key += reached * step
    return key


@triton.jit
def _uniform(stream: tl.tensor, position: tl.tensor) -> tl.tensor:
    """`tokenmill.sampling.random.uniforms` of one row."""
    bits = stream.to(tl.uint64) + (position + 1).to(tl.uint64) * GAMMA
    bits = (bits ^ (bits >> 30)) * MIX_1
    bits = (bits ^ (bits >> 27)) * MIX_2
    bits = bits ^ (bits >> 31)
    return (bits >> 11).to(tl.int64).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _draw(
    row: tl.tensor,
    vocab_size: int,
    uniform: tl.tensor,
    from_key: tl.tensor,
    lowest: tl.tensor,
    largest: tl.tensor,
    inverse: tl.tensor,
    unit: tl.constexpr,
    key_bits: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """The first token up to which the weights of the kept ones exceed `uniform` of all of them."""
    sums = tl.zeros([block], tl.int64)
    for start in range(0, vocab_size, block):
        logits = _load(row, start, vocab_size, block)
        sums += _kept(logits, from_key, lowest, largest, inverse, unit, key_bits)
    total = tl.sum(sums, 0)
    target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    before, token = total * 0, total * 0
    for start in range(0, vocab_size, block):
        kept = _kept(_load(row, start, vocab_size, block), from_key, lowest, largest, inverse, unit, key_bits)
        cumulative = before + tl.cumsum(kept, 0)
        token += tl.sum((cumulative <= target).to(tl.int64), 0)
        before += tl.sum(kept, 0)
    return tl.minimum(token, vocab_size - 1)


@triton.jit
def _kept(
    logits: tl.tensor,
    from_key: tl.tensor,
    lowest: tl.tensor,
    largest: tl.tensor,
    inverse: tl.tensor,
    unit: tl.constexpr,
    key_bits: tl.constexpr,
) -> tl.tensor:
    """Weights of the tokens that nothing has cut, zeros of the others."""
    is_kept = (_keys(logits, key_bits) >= from_key) & ((logits - largest) * inverse >= lowest)
    return tl.where(is_kept, _weights(logits, largest, inverse, unit), 0)


@triton.jit
def _sample_kernel(
    logits: tl.tensor,
    greedy: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    temperatures: tl.tensor,
    top_ks: tl.tensor,
    top_ps: tl.tensor,
    min_ps: tl.tensor,
    streams: tl.tensor,
    out: tl.tensor,
    vocab_size: int,
    row_stride: int,
    float_stride: int,
    integer_stride: int,
    unit: tl.constexpr,
    key_bits: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program a row."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * row_stride
    slot = tl.load(slots + index)
    temperature = tl.load(temperatures + slot * float_stride).to(tl.float32)
    token = tl.load(greedy + index)
    if temperature > 0.0:
        values = tl.full([block], float("-inf"), tl.float32)
        for start in range(0, vocab_size, block):
            values = tl.maximum(values, _load(row, start, vocab_size, block))
        largest, inverse = tl.max(values, 0), 1.0 / temperature
        from_key = slot.to(tl.int64) * 0
        top_k = tl.load(top_ks + slot * integer_stride)
        if (top_k > 0) & (top_k < vocab_size):
            from_key = _largest_key(
                row, vocab_size, top_k, from_key, largest, inverse, unit, True, key_bits, block
            )  # fmt: skip
        top_p = tl.load(top_ps + slot * float_stride)
        if top_p < 1.0:
            total, _, _ = _measures(
                row, vocab_size, from_key, from_key * 0, from_key, largest, inverse, unit, False, key_bits, block
            )
            product = top_p * total.to(tl.float64)
            rounded = product.to(tl.int64)
            target = tl.maximum(rounded + (rounded.to(tl.float64) < product).to(tl.int64), 1)
            key = _largest_key(row, vocab_size, target, from_key, largest, inverse, unit, False, key_bits, block)
            from_key = tl.maximum(from_key, key)
        min_p = tl.load(min_ps + slot * float_stride)
        lowest = tl.where(min_p > 0.0, tl.log(tl.maximum(min_p, 1e-300)), float("-inf")).to(tl.float32)
        uniform = _uniform(tl.load(streams + slot * integer_stride), tl.load(positions + index))
        token = _draw(row, vocab_size, uniform, from_key, lowest, largest, inverse, unit, key_bits, block)
    tl.store(out + index, token)


def sample_tokens(
    logits: torch.Tensor, greedy: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, columns: SlotColumns
) -> torch.Tensor:
    """See `ops.sampling.sample_tokens`."""
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(vocab_size))
    if num_rows:
        _sample_kernel[(num_rows,)](
            logits, greedy, slots, positions, *columns, out, vocab_size,
            logits.stride(0), columns.temperature.stride(0), columns.top_k.stride(0),
            unit=float(2 ** (62 - vocab_size.bit_length())),
            key_bits={torch.bfloat16: 16, torch.float16: 20}.get(logits.dtype, 32),
            block=block,
            num_warps=4 if is_interpreted() else max(1, min(NUM_WARPS, block // 256)),
        )  # fmt: skip
    return out
