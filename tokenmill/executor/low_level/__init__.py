"""The low-level interface: token ids in, responses out, nothing of text. Named and shaped as TensorRT-LLM's bindings.

`Executor` is the entry; `tokenmill.executor` exports it with its types.
"""
