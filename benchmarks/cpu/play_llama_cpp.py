"""llama.cpp's turn in `compare.py`: one measurement of each work, printed as JSON. Also converts files.

Runs in an interpreter that has `llama-cpp-python`, which need not be tokenmill's; imports nothing of this repository.

    python play_llama_cpp.py measure MODEL.gguf --threads 2 --seed 0
    python play_llama_cpp.py convert MODEL.gguf OUTPUT.gguf q4_0
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import time
from dataclasses import dataclass

import llama_cpp as llama
import numpy as np

FILE_TYPES = {"q4_0": 2, "q8_0": 7}
"""Numbers of llama.cpp's `llama_ftype`."""


@dataclass
class Context:
    """A loaded model with room for some sequences.

    Args:
        context: llama.cpp's own.
        vocab_size: of the model.
        capacity: tokens that one batch can hold.
    """

    context: object
    vocab_size: int
    capacity: int

    def __post_init__(self) -> None:
        self.batch = llama.llama_batch_init(self.capacity, 0, 1)

    def decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Compute (token, position, sequence, whether logits are wanted) entries as one batch."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for index, (token, position, sequence, wants_logits) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wants_logits
        if llama.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def most_likely(self, index: int) -> int:
        """The greedy choice after entry `index` of the last batch."""
        logits = llama.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())

    def clear(self) -> None:
        """Forget all sequences."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)


def main() -> None:
    """Measure or convert."""
    parser = argparse.ArgumentParser(description="llama.cpp's turn in a comparison.")
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("model")
    measuring.add_argument("--threads", type=int, required=True)
    measuring.add_argument("--seed", type=int, default=0)
    converting = commands.add_parser("convert")
    converting.add_argument("model")
    converting.add_argument("output")
    converting.add_argument("type", choices=sorted(FILE_TYPES))
    options = parser.parse_args()
    silence()
    if options.command == "convert":
        convert(options.model, options.output, FILE_TYPES[options.type])
    else:
        print(json.dumps(measure(options.model, options.threads, options.seed)))


def silence() -> None:
    """llama.cpp writes about everything that it does."""
    callback = llama.llama_log_callback(lambda level, text, data: None)
    silence.callback = callback  # type: ignore[attr-defined]  # it must live as long as the library
    llama.llama_log_set(callback, ctypes.c_void_p(0))


def convert(source: str, output: str, file_type: int) -> None:
    """Quantize a file anew; weights that are quantized already are dequantized first."""
    params = llama.llama_model_quantize_default_params()
    params.ftype = file_type
    params.allow_requantize = True
    if llama.llama_model_quantize(source.encode(), output.encode(), params) != 0:
        raise SystemExit(f"{source} cannot be converted")


def measure(model_path: str, num_threads: int, seed: int) -> dict[str, float]:
    """Tokens a second of each work, and seconds to the first token."""
    started = time.perf_counter()
    context = load(model_path, num_threads)
    context.decode([(1, 0, 0, True)])
    context.most_likely(0)
    start = time.perf_counter() - started
    choose = random.Random(seed)
    generate(context, choose, num_sequences=1, input_len=32, output_len=8)  # warm-up
    generate(context, choose, num_sequences=16, input_len=32, output_len=8)
    single = generate(context, choose, num_sequences=1, input_len=128, output_len=128)
    batch = generate(context, choose, num_sequences=16, input_len=128, output_len=128)
    prefill = generate(context, choose, num_sequences=1, input_len=1024, output_len=1)
    return {"decode": 128 / single, "batch": 16 * 128 / batch, "prefill": 1024 / prefill, "start": start}


def load(model_path: str, num_threads: int) -> Context:
    """With room for 16 sequences of 256 tokens or one of 1,024."""
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(model_path.encode(), llama.llama_model_default_params())
    params = llama.llama_context_default_params()
    params.n_ctx = 16 * 320
    params.n_batch = params.n_ubatch = 2048
    params.n_seq_max = 16
    params.n_threads = params.n_threads_batch = num_threads
    if hasattr(params, "kv_unified"):
        params.kv_unified = True  # else each sequence could have 320 tokens only
    context = llama.llama_init_from_model(model, params)
    if not context:
        raise SystemExit(f"{model_path} cannot be loaded")
    return Context(context, llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model)), 2048)


def generate(context: Context, choose: random.Random, *, num_sequences: int, input_len: int, output_len: int) -> float:
    """Seconds for random prompts and their greedy answers, all at the same time."""
    context.clear()
    prompts = [[choose.randrange(3, context.vocab_size) for _ in range(input_len)] for _ in range(num_sequences)]
    started = time.perf_counter()
    entries = [
        (token, position, sequence, position == input_len - 1)
        for sequence, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    context.decode(entries)
    last = [context.most_likely((sequence + 1) * input_len - 1) for sequence in range(num_sequences)]
    for position in range(input_len, input_len + output_len - 1):
        context.decode([(token, position, sequence, True) for sequence, token in enumerate(last)])
        last = [context.most_likely(sequence) for sequence in range(num_sequences)]
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
