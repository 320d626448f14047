"""The native CPU step: kernels in Python, the op list, and the threads that walk it. Called by `runtime/`'s executors.

**A kernel** is a function `(thread, num_threads, row) -> None` of three int64, in the small part of Python that
`native_functions.py` describes, decorated with `@kernel` of `jit.py`. It is compiled at first use of its `address`, or
read from the disk cache; `compile_all` of `compile_processes.py` does it for many at once. `row` is the address of a
row of the op list: `ROW_SIZE` int64 (`layout.py`), read with `argument(row, column)` and `float_argument(row, column)`:

| column | content |
|---|---|
| 0 `COLUMN_KERNEL` | address of the kernel |
| 1 `COLUMN_NUM_TOKENS` | tokens (or rows) that the op computes; the only number that changes from step to step |
| 2 `COLUMN_BARRIER` | 1: all threads meet after this op; 0: the next op needs nothing that this one writes |
| 3 ... | the kernel's own: addresses, sizes, strides in bytes, float64 bits (`float_bits`); named beside it |

Rules:
- Work is cut into chunks whose size depends on shapes only, never on `num_threads`, and a chunk is computed in one
  fixed order: results are bitwise equal for any number of threads. `chunk_range(thread, num_threads, num_chunks)` of
  `intrinsics.py` says which chunks are a thread's own (contiguous). One thread may do all of a small op.
- No allocation, no exceptions, no Python objects: only scalars, addresses, the vectors of `simd.py`, and helpers
  decorated with `@device` of `jit.py`. Shapes are checked by who writes the row.
- A buffer of [tokens, columns] float32 is an address and a stride between rows in bytes. `int8_group32` buffers have
  the layout of `layout.py`.
- Scratch memory is given in the row: an address and the bytes per thread.
- Denormals are zero in every thread.

Where what is: `native_types.py`, `native_expressions.py` and `native_functions.py` translate Python to LLVM code,
`machine_code.py` makes machine code of it; `simd.py`, `scalars.py`, `vector_math.py` and `intrinsics.py` have the
operations that kernels call. `threads.py` has `OpList` and `ThreadPool`; `packing.py` the layout of weights;
`activations.py` and `layout.py` that of quantized activations; `linear_int8.py` and `linear_blocks.py` the int8
products; `linear_float.py` those of float32 and bfloat16 weights. `elementwise.py` has small examples of kernels.
Each module has a function that checks and lays out the arguments of a row, such as `linear_arguments`.
"""
