"""The shortest time of a work of `llama8b` or `qwen3_moe` on a device, in the steps that the scheduler plans.

    python -m benchmarks.gpu.work_limits --work 128/128/2048 1000/1000/512 --cache-tokens 438000
    python -m benchmarks.gpu.work_limits --model qwen3_moe --quantization fp8 --work 1000/1000/256 --cache-tokens 927648

Needs no GPU: the engine's own scheduler and cache manager plan all steps for a runner that computes nothing. A step's
weights and cache are read once and its products computed once, at the rates that are given; everything else (norms,
activations, sampling, launches, reading a prompt's keys more than once) counts as nothing. Two limits come out: one for
operations that run one after the other, each bound by memory or by arithmetic, and one as if memory and arithmetic of a
whole step were busy all the time.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.gpu.llama8b import LLAMA, prompts
from benchmarks.gpu.qwen3_moe import QWEN3
from tokenmill import SamplingParams
from tokenmill.engine.core import EngineCore
from tokenmill.engine.events import Failed
from tokenmill.engine.plan import BatchPlan, RowOutput, StepOutput
from tokenmill.engine.request import GenerationRequest
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.settings import SchedulerSettings
from tokenmill.kv_cache.manager import KvCacheManager
from tokenmill.models.config import ModelConfig
from tokenmill.models.step_costs import StepOperation, step_costs
from tokenmill.program.costs import Cost, StepSize

MODELS = {"llama8b": LLAMA, "qwen3_moe": QWEN3}
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Rates:
    """What the device does in a second.

    Args:
        bandwidth: bytes read.
        flops: of products in 16 bits.
        linear_flops: of products of linear layers and experts.
        cache_nbytes: of a cached number.
        linear_nbytes: of a weight of linear layers and experts.
    """

    bandwidth: float
    flops: float
    linear_flops: float
    cache_nbytes: int
    linear_nbytes: float

    def seconds(self, operation: StepOperation) -> tuple[float, float]:
        """Of reading and of computing."""
        cost = operation.cost
        if operation.kind == "attention":
            return cost.activation_bytes / self.bandwidth, cost.flops / self.flops
        is_wide = operation.name in ("lm_head", "router")
        return cost.weight_bytes / self.bandwidth, cost.flops / (self.flops if is_wide else self.linear_flops)


@dataclass
class Total:
    """Seconds over all steps of a kind."""

    num_steps: int = 0
    in_turn: float = 0.0
    overlapped: float = 0.0
    by_operation: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class CountingRunner:
    """A `Runner` that computes nothing and adds up what each step would have cost."""

    def __init__(self, config: ModelConfig, rates: Rates) -> None:
        self._config = config
        self._rates = rates
        self._known: dict[tuple[int, int], tuple[StepOperation, ...]] = {}
        self.totals: dict[str, Total] = defaultdict(Total)

    def launch(self, plan: BatchPlan) -> BatchPlan:
        """Count."""
        num_rows = sum(row.sample for row in plan.rows)
        total = self.totals["decode" if plan.num_tokens == len(plan.rows) else "with prompts"]
        total.num_steps += 1
        times = {
            operation.name: self._rates.seconds(operation)
            for operation in (*self._products(plan.num_tokens, num_rows), self._attention(plan))
        }
        total.in_turn += sum(max(pair) for pair in times.values())
        total.overlapped += max(sum(read for read, _ in times.values()), sum(compute for _, compute in times.values()))
        for name, pair in times.items():
            total.by_operation[name] += max(pair)
        return plan

    def collect(self, pending: BatchPlan) -> StepOutput:
        """The same token for all."""
        return StepOutput(tuple(RowOutput(token_id=7 if row.sample else None) for row in pending.rows))

    def run(self, plan: BatchPlan) -> StepOutput:
        """See `Runner`."""
        return self.collect(self.launch(plan))

    def _products(self, num_tokens: int, num_rows: int) -> tuple[StepOperation, ...]:
        key = (num_tokens, num_rows)
        if key not in self._known:
            step = StepSize(num_tokens=num_tokens, num_rows=num_rows, context_len=num_tokens)
            operations = step_costs(self._config, step, linear_nbytes=self._rates.linear_nbytes)
            self._known[key] = tuple(one for one in operations if one.kind in ("linear", "head", "experts"))
        return self._known[key]

    def _attention(self, plan: BatchPlan) -> StepOperation:
        """Of full attention: a prompt's earlier keys are read once, its own are not counted."""
        config = self._config
        read = sum(row.start + (row.num_tokens == 1) for row in plan.rows)
        pairs = sum(row.num_tokens * row.start + row.num_tokens * (row.num_tokens + 1) // 2 for row in plan.rows)
        num_bytes = (
            2 * read * config.num_key_value_heads * config.head_dim * self._rates.cache_nbytes * config.num_layers
        )
        flops = 4 * pairs * config.num_attention_heads * config.head_dim * config.num_layers
        return StepOperation("attention", "attention", config.num_layers, Cost(activation_bytes=num_bytes, flops=flops))


def main() -> None:
    """Count and print."""
    options = parse_arguments()
    is_float8 = options.quantization == "fp8"
    rates = Rates(
        options.bandwidth * 1e12,
        options.flops * 1e12,
        (options.float8_flops if is_float8 else options.flops) * 1e12,
        cache_nbytes=1 if is_float8 else 2,
        linear_nbytes=1.0 if is_float8 else 2.0,
    )
    config = ModelConfig.from_hf(MODELS[options.model].config)
    for work in options.work:
        report(work, count(config, rates, work, options))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="llama8b")
    parser.add_argument("--work", nargs="+", required=True, help="input/output/requests")
    parser.add_argument("--quantization", choices=["fp8"], default=None, help="weights and cache")
    parser.add_argument("--cache-tokens", type=int, required=True, help="as the benchmark prints it at its start")
    parser.add_argument("--max-batch-size", type=int, default=1024)
    parser.add_argument("--max-num-tokens", type=int, default=8192)
    parser.add_argument("--bandwidth", type=float, default=3.06, help="TB/s")
    parser.add_argument("--flops", type=float, default=798.0, help="TFLOP/s of bfloat16 products")
    parser.add_argument("--float8-flops", type=float, default=1330.0, help="TFLOP/s of float8 products")
    return parser.parse_args()


def count(config: ModelConfig, rates: Rates, work: str, options: argparse.Namespace) -> Mapping[str, Total]:
    """Plan all steps of a work; totals by kind of step."""
    input_len, output_len, num_requests = (int(part) for part in work.split("/"))
    settings = SchedulerSettings(
        max_batch_size=options.max_batch_size, max_num_tokens=options.max_num_tokens, max_seq_len=4096
    )
    cache = KvCacheManager(options.cache_tokens // BLOCK_SIZE + 1, BLOCK_SIZE, enable_block_reuse=False)
    runner = CountingRunner(config, rates)
    core = EngineCore(Scheduler(settings, cache), runner)
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    for index, prompt in enumerate(prompts(num_requests, input_len, seed=2)):
        core.add(GenerationRequest(index, tuple(prompt), params, seed=index))
    while core.has_work:
        failed = [event for event in core.step() if isinstance(event, Failed)]
        assert not failed, failed
    return runner.totals


def report(work: str, totals: Mapping[str, Total]) -> None:
    """Seconds by kind of step and operation, and the rates that they allow."""
    _, output_len, num_requests = (int(part) for part in work.split("/"))
    for kind, total in totals.items():
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in total.by_operation.items())
        print(f"{work} {kind}: {total.num_steps} steps, at least {total.in_turn:.2f} s ({parts})")
    num_tokens = output_len * num_requests
    in_turn, overlapped = (sum(getattr(one, name) for one in totals.values()) for name in ("in_turn", "overlapped"))
    print(
        f"{work}: at most {num_tokens / in_turn:,.0f} output tokens/s with one operation after the other"
        f" ({in_turn:.1f} s), {num_tokens / overlapped:,.0f} with memory and arithmetic at the same time"
    )


if __name__ == "__main__":
    main()
