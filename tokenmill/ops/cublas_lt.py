"""cuBLASLt (https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api), for what torch leaves out: the choice among
its algorithms, and float8 products with a scale for each row that are added to their output.

The library is the one that torch loaded. Matrices are row-major here; cuBLASLt counts columns first and is given the
transposed product: weight [O, I] times x [T, I] is its D [O, T]. Called by `ops.library_product` and
`ops.product_timing`; `inspection` asks for the machine.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from threading import Lock
from typing import Final, NamedTuple

import torch

from tokenmill.ops.cublas_lt_names import AlgorithmNumbers, algorithm_name
from tokenmill.ops.product_choices import GpuMachine

# Numbers of cublasLt.h and library_types.h.
_DATA_TYPES: Final = {torch.bfloat16: 14, torch.float16: 2, torch.float8_e4m3fn: 28}
_CUDA_R_32F: Final = 0
_COMPUTE_32F: Final = 68
_OP_T: Final = 1
_DESC_TRANSA: Final = 3
_DESC_A_SCALE_POINTER: Final = 17
_DESC_B_SCALE_POINTER: Final = 18
_DESC_FAST_ACCUM: Final = 25
_DESC_A_SCALE_MODE: Final = 31
_DESC_B_SCALE_MODE: Final = 32
_SCALE_OUTER_VECTOR: Final = 3
_NOT_SUPPORTED: Final = 15
_ATTRIBUTES_OF_TWO_BYTES: Final = (7, 8)
"""Of an algorithm; the others have four."""
ALIGNMENT: Final = 256
"""Bytes; the library takes for granted that addresses are multiples."""

_ONE: Final = ctypes.c_float(1.0)
_ZERO: Final = ctypes.c_float(0.0)


class CublasLtError(RuntimeError):
    """A call of the library failed; the text has its status."""


class Algorithm(ctypes.Structure):
    """`cublasLtMatmulHeuristicResult_t`: an algorithm, and what it needs."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )

    def name(self) -> str:
        """Tile, stages and splits, as text; what the library does not tell is left out."""
        numbers, written = [], ctypes.c_size_t()
        for attribute in range(len(AlgorithmNumbers._fields)):
            value = ctypes.c_uint32(0)
            size = 2 if attribute in _ATTRIBUTES_OF_TWO_BYTES else 4
            library().cublasLtMatmulAlgoConfigGetAttribute(
                ctypes.byref(self), attribute, ctypes.byref(value), size, ctypes.byref(written)
            )
            numbers.append(value.value)
        return algorithm_name(AlgorithmNumbers(*numbers))


class ProductShape(NamedTuple):
    """A product [T, I] by [O, I] to [T, O]; `dtype` is of the factors, `out_dtype` of the result."""

    num_rows: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    out_dtype: torch.dtype


class Product:
    """A product described to the library. Needs no workspace: algorithms that do are left out.

    Raises:
        CublasLtError: the library does not know such products.
    """

    def __init__(self, shape: ProductShape) -> None:
        self._library = library()
        self._handle = _handle(torch.cuda.current_device())
        self._lock = Lock()
        self._description = self._create("cublasLtMatmulDescCreate", _COMPUTE_32F, _CUDA_R_32F)
        self._set(_DESC_TRANSA, ctypes.c_int32(_OP_T))
        if shape.dtype == torch.float8_e4m3fn:
            self._set(_DESC_FAST_ACCUM, ctypes.c_int8(1))
            self._set(_DESC_A_SCALE_MODE, ctypes.c_int32(_SCALE_OUTER_VECTOR))
            self._set(_DESC_B_SCALE_MODE, ctypes.c_int32(_SCALE_OUTER_VECTOR))
            self._set_scales(ALIGNMENT, ALIGNMENT)  # some address: the heuristic asks whether there is one
        rows, columns = _DATA_TYPES[shape.dtype], shape.in_features
        self._weight = self._create("cublasLtMatrixLayoutCreate", rows, columns, shape.out_features, columns)
        self._x = self._create("cublasLtMatrixLayoutCreate", rows, columns, shape.num_rows, columns)
        self._out = self._create(
            "cublasLtMatrixLayoutCreate",
            _DATA_TYPES[shape.out_dtype],
            shape.out_features,
            shape.num_rows,
            shape.out_features,
        )

    def algorithms(self, num_algorithms: int) -> list[Algorithm]:
        """Up to so many, the library's best guess first."""
        preference = self._create("cublasLtMatmulPreferenceCreate")  # says: no workspace
        found, count = (Algorithm * num_algorithms)(), ctypes.c_int(0)
        status = self._library.cublasLtMatmulAlgoGetHeuristic(
            self._handle, self._description, self._weight, self._x, self._out, self._out, preference,
            num_algorithms, found, ctypes.byref(count),
        )  # fmt: skip
        self._library.cublasLtMatmulPreferenceDestroy(preference)
        if status != _NOT_SUPPORTED:
            _check("cublasLtMatmulAlgoGetHeuristic", status)
        return [one for one in found[: count.value] if one.state == 0 and one.workspace_bytes == 0]

    def run(
        self,
        algorithm: Algorithm,
        x: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        *,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        adds: bool = False,
    ) -> None:
        """Launch: write the product to `out` [T, O], or add it to what is there. Contiguous and aligned, all of them.

        Args:
            algorithm: of this product, or of one with another number of rows.
            x: [T, I].
            weight: [O, I].
            out: [T, O].
            scales: of the rows of x [T] and of weight [O], float32.
            adds: whether to add.

        Raises:
            CublasLtError: the algorithm cannot compute this product.
        """
        target, factor = out.data_ptr(), _ONE if adds else _ZERO
        stream = torch.cuda.current_stream(x.device).cuda_stream
        with self._lock:  # the scales belong to the description
            if scales is not None:
                self._set_scales(scales[1].data_ptr(), scales[0].data_ptr())
            status = self._library.cublasLtMatmul(
                self._handle, self._description, ctypes.byref(_ONE), weight.data_ptr(), self._weight,
                x.data_ptr(), self._x, ctypes.byref(factor), target, self._out, target, self._out,
                ctypes.byref(algorithm), None, 0, stream,
            )  # fmt: skip
        _check("cublasLtMatmul", status)

    def __del__(self) -> None:
        """Give the library's descriptions back."""
        for name in ("_weight", "_x", "_out"):
            if hasattr(self, name):
                self._library.cublasLtMatrixLayoutDestroy(getattr(self, name))
        if hasattr(self, "_description"):
            self._library.cublasLtMatmulDescDestroy(self._description)

    def _create(self, function: str, *arguments: int) -> ctypes.c_void_p:
        created = ctypes.c_void_p()
        _check(function, getattr(self._library, function)(ctypes.byref(created), *arguments))
        return created

    def _set(self, attribute: int, value: ctypes.c_int32 | ctypes.c_int8 | ctypes.c_uint64) -> None:
        status = self._library.cublasLtMatmulDescSetAttribute(
            self._description, attribute, ctypes.byref(value), ctypes.sizeof(value)
        )
        _check("cublasLtMatmulDescSetAttribute", status)

    def _set_scales(self, weight_scales: int, x_scales: int) -> None:
        self._set(_DESC_A_SCALE_POINTER, ctypes.c_uint64(weight_scales))
        self._set(_DESC_B_SCALE_POINTER, ctypes.c_uint64(x_scales))


@lru_cache(maxsize=4096)
def product_of(shape: ProductShape, device_index: int) -> Product:
    """The description, made once for a device, which is the current one.

    Raises:
        CublasLtError: the library does not know such products.
    """
    return Product(shape)


def product_shape(num_rows: int, weight: torch.Tensor, out_dtype: torch.dtype) -> ProductShape:
    """Of some rows by weight [O, I]."""
    return ProductShape(num_rows, weight.shape[0], weight.shape[1], weight.dtype, out_dtype)


def launches(
    algorithm: Algorithm, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, adds: bool = False
) -> bool:
    """`Product.run` without scales, if the algorithm can compute the product; whether it could."""
    shape = product_shape(x.shape[0], weight, out.dtype)
    try:
        product_of(shape, torch.cuda.current_device()).run(algorithm, x, weight, out, adds=adds)
    except CublasLtError:
        return False
    return True


def is_aligned(x: torch.Tensor) -> bool:
    """Whether the library takes a tensor as it lies."""
    return x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0


def gpu_machine(device: torch.device) -> GpuMachine:
    """What the speed of algorithms depends on, and the meaning of their bytes."""
    properties, driver = torch.cuda.get_device_properties(device), ctypes.c_int()
    _check("cuDriverGetVersion", ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver)))
    return GpuMachine(
        device=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        driver=driver.value,
        cublas_lt=library().cublasLtGetVersion(),
        torch=str(torch.__version__),
    )


@lru_cache(maxsize=1)
def is_available() -> bool:
    """Whether torch has brought the library."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False
    try:
        library()
    except OSError:
        return False
    return True


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The library that torch loaded, its functions typed."""
    loaded = ctypes.CDLL(f"libcublasLt.so.{(torch.version.cuda or '').partition('.')[0]}")
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    arguments = {
        "cublasLtCreate": [pointer],
        "cublasLtMatmulDescCreate": [pointer, number, number],
        "cublasLtMatmulDescSetAttribute": [pointer, number, pointer, size],
        "cublasLtMatrixLayoutCreate": [pointer, number, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64],
        "cublasLtMatmulDescDestroy": [pointer],
        "cublasLtMatrixLayoutDestroy": [pointer],
        "cublasLtMatmulPreferenceCreate": [pointer],
        "cublasLtMatmulPreferenceDestroy": [pointer],
        "cublasLtMatmulAlgoGetHeuristic": [*[pointer] * 7, number, pointer, pointer],
        "cublasLtMatmulAlgoConfigGetAttribute": [pointer, number, pointer, size, pointer],
        "cublasLtMatmul": [*[pointer] * 14, size, pointer],
        "cublasLtGetVersion": [],
    }
    for name, types in arguments.items():
        getattr(loaded, name).argtypes = types
    loaded.cublasLtGetVersion.restype = size
    return loaded


@lru_cache(maxsize=64)
def _handle(device_index: int) -> ctypes.c_void_p:
    """One for each device."""
    created = ctypes.c_void_p()
    _check("cublasLtCreate", library().cublasLtCreate(ctypes.byref(created)))
    return created


def _check(function: str, status: int) -> None:
    if status:
        raise CublasLtError(f"{function} returned status {status}.")
