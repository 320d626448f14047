"""One token for each row of logits, with top-k, top-p, min-p and temperature: the kernel and the torch steps.

python -m benchmarks.gpu.sampling
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from benchmarks.gpu.timing import Row, event_time, write_results
from tokenmill.engine.plan import NewSlot
from tokenmill.sampling import sampler as sampler_module
from tokenmill.sampling.sampler import Sampler
from tokenmill.sampling.slot_params import SlotSamplingParams
from tokenmill.sampling_params import SamplingParams

VOCAB_SIZE = 128256
NUM_ROWS = (1, 64, 512)
PARAMETERS = {
    "temperature": SamplingParams(temperature=0.8),
    "top-k 40": SamplingParams(temperature=0.8, top_k=40),
    "top-p 0.9": SamplingParams(temperature=0.8, top_p=0.9),
    "all": SamplingParams(temperature=0.8, top_k=300, top_p=0.9, min_p=0.01),
}
RESULTS = Path(__file__).parents[1] / "results" / "gpu_sampling.json"
REPEATS = 7


def main() -> None:
    """Measure, print, write."""
    rows = []
    for name, sampling in PARAMETERS.items():
        for num_rows in NUM_ROWS:
            rows.append(measure(name, sampling, num_rows))
            print(f"{rows[-1].work:28} {rows[-1].value:10.1f} us, steps {rows[-1].peer or 0.0:10.1f} us", flush=True)
    write_results("sampling", rows, RESULTS)


def measure(name: str, sampling: SamplingParams, num_rows: int) -> Row:
    """The median time of a call on the device; launches of the steps are too many to hide their own."""
    params = SlotSamplingParams(num_rows, VOCAB_SIZE, "cuda")
    params.assign([NewSlot(slot, (1,), 1, (), sampling, slot, 0, ()) for slot in range(num_rows)])
    sampler, slot_list = Sampler(params), list(range(num_rows))
    logits = (torch.randn(num_rows, VOCAB_SIZE, device="cuda") * 3).to(torch.bfloat16)
    slots, positions = torch.arange(num_rows, device="cuda"), torch.ones(num_rows, dtype=torch.int64, device="cuda")
    buffer = torch.ones(num_rows, 8, dtype=torch.int32, device="cuda")
    times = []
    for can_sample in (sampler_module.can_sample, lambda logits: False):
        before, sampler_module.can_sample = sampler_module.can_sample, can_sample
        calls = [_seconds(lambda: sampler.sample(logits, slots, slot_list, positions, buffer)) for _ in range(REPEATS)]
        times.append(sorted(calls)[REPEATS // 2] * 1e6)
        sampler_module.can_sample = before
    return Row(f"{name}, {num_rows} rows", "time of a step's sampling", times[0], "us", peer=times[1])


def _seconds(call: object) -> float:
    assert callable(call)
    call()
    torch.cuda.synchronize()
    time.sleep(0.01)
    return event_time(call)


if __name__ == "__main__":
    main()
