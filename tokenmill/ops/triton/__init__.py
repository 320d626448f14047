"""Triton kernels, one file for each file of `ops`: same functions, same meaning, made for NVIDIA GPUs.

Only `ops` imports these modules, and only when a tensor is on a GPU: importing triton takes a moment, and a CPU needs
none of it. Kernels allocate nothing but their results and never wait for the device, so CUDA graphs can capture them.
With `TRITON_INTERPRET=1` set before triton is first imported they run on the CPU, for tests.
"""
