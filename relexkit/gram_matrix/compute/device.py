"""Where the products of a pass are computed: on the processor with NumPy, or on a device with
PyTorch.

A kernel's arithmetic is written once, in operators that both have. Products over at most ``width``
columns are float32, their sums float64, on either side. On a GPU the rows are decoded into pinned
memory and copied on a stream of their own, so that decoding, transfer and arithmetic overlap.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from relexkit.errors import RelexkitError
from relexkit.processes import cores

PIECE = 2**13
"""Columns whose products are accumulated in float32, and in cache, before the sum goes to float64.
"""

WORKERS = min(16, cores())
"""Threads of a pass; they share its memory."""

_NARROW = 2**14  # columns whose products are cheap enough for float64

_APART = 16  # elements between rows of a buffer

_SMALLEST, _LARGEST = (
    1e-25,
    1e30,
)  # of a product in float32 that has neither lost digits nor come near the range's end


class Kernel(Protocol):
    """Arithmetic of a pass."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the arrays that one product makes."""

    @property
    def of_updates(self) -> bool:
        """Whether it takes the step-to-step updates of a sparse log, or the deltas as from dense
        rows.
        """

    @property
    def width(self) -> int:
        """Columns of a product on the processor, so that a piece of rows stays in cache."""

    def constants(self, segment: int) -> tuple[np.ndarray, ...]:
        """Float32 arrays that the products of a segment take."""

    def product(self, rows: Any, *constants: Any) -> list[Any]:
        """Arrays of ``shapes`` from ``rows [T, n]`` and the constants, of NumPy or PyTorch
        alike.
        """


class Pending(Protocol):
    """A product that is being computed."""

    def result(self) -> list[np.ndarray]:
        """Wait for it; float64."""


class Engine(Protocol):
    """A place where products are computed. ``width``: columns that a gathered piece should have."""

    width: int

    def buffer(self, shape: tuple[int, int]) -> np.ndarray:
        """Memory for decoded rows, float32."""

    def load(self, rows: np.ndarray) -> Any:
        """Begin to bring ``rows [T, n]`` to the device; the buffer must stay as it is until the
        products are done.
        """

    def submit(
        self,
        kernel: Kernel,
        segment: int,
        rows: np.ndarray,
        loaded: Any,
        span: tuple[int, int],
        pool: ThreadPoolExecutor,
    ) -> Pending:
        """Begin the product of columns ``span`` of ``rows``, which ``loaded`` holds on the
        device.
        """

    def product(self, kernel: Kernel, segment: int, rows: np.ndarray) -> list[np.ndarray]:
        """The product of ``rows``, now. Thread-safe."""


def open_engine(device: str) -> Engine:
    """The engine of ``--device``: ``cpu`` (NumPy), ``cuda``, ``cuda:N``, or any device of PyTorch.

    Raises:
        RelexkitError: the device is not there.
    """
    return CpuEngine() if device == "cpu" else TorchEngine(device)


class CpuEngine:
    """NumPy, one thread a product."""

    width = PIECE

    def buffer(self, shape: tuple[int, int]) -> np.ndarray:
        """Ordinary memory; the distance between rows is not a power of two, so that they do not
        compete for cache lines.
        """
        return np.empty((shape[0], shape[1] + _APART), np.float32)[:, : shape[1]]

    def load(self, rows: np.ndarray) -> np.ndarray:
        """The rows are in place already."""
        return rows

    def submit(
        self,
        kernel: Kernel,
        segment: int,
        rows: np.ndarray,
        loaded: Any,
        span: tuple[int, int],
        pool: ThreadPoolExecutor,
    ) -> Pending:
        """Give the product to the pool."""
        return pool.submit(self.product, kernel, segment, rows[:, span[0] : span[1]])

    def product(self, kernel: Kernel, segment: int, rows: np.ndarray) -> list[np.ndarray]:
        """Sum of the products of pieces of the kernel's width."""
        if rows.shape[1] <= _NARROW:
            return wide_product(kernel, segment, rows)
        with np.errstate(over="ignore", invalid="ignore"):
            sums = _sum_of_pieces(kernel, rows, kernel.constants(segment))
        return sums if fits_float32(sums[0], rows) else wide_product(kernel, segment, rows)


def _sum_of_pieces(
    kernel: Kernel, rows: np.ndarray, constants: tuple[np.ndarray, ...]
) -> list[np.ndarray]:
    sums = [np.zeros(shape) for shape in kernel.shapes]
    for left in range(0, rows.shape[1], kernel.width):
        for total, product in zip(
            sums, kernel.product(rows[:, left : left + kernel.width], *constants), strict=True
        ):
            total += product
    return sums


def fits_float32(product: np.ndarray, rows: np.ndarray) -> bool:
    """Whether a product of ``rows`` summed from float32 has columns enough for its errors to
    average out, and neither overflowed nor lost squares to underflow.
    """
    if rows.shape[1] <= _NARROW:
        return False
    largest = np.abs(product).max(initial=0.0)
    return bool(_SMALLEST < largest < _LARGEST) or not rows.any()


def wide_product(kernel: Kernel, segment: int, rows: np.ndarray) -> list[np.ndarray]:
    """The product in float64 throughout: for few columns, and for deltas whose squares leave the
    range of float32.
    """
    return _sum_of_pieces(
        kernel,
        rows.astype(np.float64),
        tuple(c.astype(np.float64) for c in kernel.constants(segment)),
    )


class TorchEngine:
    """PyTorch on a device. Without a GPU it runs on ``torch:cpu``, which the tests do.

    Raises:
        RelexkitError: the device is not there.
    """

    width = 2**15

    def __init__(self, device: str):
        import torch

        self._torch = torch
        name = device.removeprefix("torch:")
        try:
            self.device = torch.device(name)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            available = (
                f"{torch.cuda.device_count()} CUDA devices"
                if torch.cuda.is_available()
                else "no CUDA device"
            )
            raise RelexkitError(
                f"--device {device} cannot be used ({str(error).splitlines()[0]}); this PyTorch"
                f" {torch.__version__} finds {available}: use --device cpu"
            ) from error
        self._cuda = self.device.type == "cuda"
        self._copies = torch.cuda.Stream(self.device) if self._cuda else None

    def buffer(self, shape: tuple[int, int]) -> np.ndarray:
        """Pinned memory for a GPU, so that it is copied from without waiting."""
        return self._torch.empty(shape, dtype=self._torch.float32, pin_memory=self._cuda).numpy()

    def load(self, rows: np.ndarray) -> Any:
        """Copy on the stream of copies; the stream of products waits for it, the processor does
        not.
        """
        host = self._torch.from_numpy(rows)
        if self._copies is None:
            return host.to(self.device)
        with self._torch.cuda.stream(self._copies):
            loaded = self._torch.empty(host.shape, dtype=host.dtype, device=self.device)
            # a narrower last window is not contiguous in its buffer, and only contiguous copies do
            # not wait
            pairs = [(loaded, host)] if host.is_contiguous() else zip(loaded, host, strict=True)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        products = self._torch.cuda.current_stream(self.device)
        products.wait_stream(self._copies)
        loaded.record_stream(products)
        return loaded

    def submit(
        self,
        kernel: Kernel,
        segment: int,
        rows: np.ndarray,
        loaded: Any,
        span: tuple[int, int],
        pool: ThreadPoolExecutor,
    ) -> Pending:
        """Queue the products on the device and come back."""
        low, high = span
        with self._torch.no_grad():
            sums = self._sums(kernel, segment, loaded[:, low:high])
        return _TorchPending(sums, kernel, segment, rows[:, low:high])

    def product(self, kernel: Kernel, segment: int, rows: np.ndarray) -> list[np.ndarray]:
        """To the device, multiply, and back."""
        with self._torch.no_grad():
            sums = self._sums(kernel, segment, self._torch.from_numpy(rows).to(self.device))
        return _TorchPending(sums, kernel, segment, rows).result()

    def _sums(self, kernel: Kernel, segment: int, rows: Any) -> list[Any]:
        constants = tuple(
            self._torch.from_numpy(c).to(self.device) for c in kernel.constants(segment)
        )
        sums: list[Any] = []
        for left in range(0, rows.shape[1], self.width):
            products = [
                p.double() for p in kernel.product(rows[:, left : left + self.width], *constants)
            ]
            sums = (
                [total + product for total, product in zip(sums, products, strict=True)]
                if sums
                else products
            )
        return sums


@dataclass
class _TorchPending:
    sums: list[Any]
    kernel: Kernel
    segment: int
    rows: np.ndarray

    def result(self) -> list[np.ndarray]:
        totals = [total.cpu().numpy() for total in self.sums]
        return (
            totals
            if fits_float32(totals[0], self.rows)
            else wide_product(self.kernel, self.segment, self.rows)
        )
