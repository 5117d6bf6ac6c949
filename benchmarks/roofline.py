"""Computes the roofline: the shortest possible time of a network, from counted work and measured rates.

Two rates are measured: a large matrix product, and a large copy in the device's memory. The roofline is
the longer of two times. Result files call it ``floor``.

- Arithmetic: floating-point operations of matrix products, convolutions and attention, as PyTorch's
  FlopCounterMode counts them (a multiplication and its addition are two), over the matrix rate.
- Memory: bytes over the copy rate. Counted are each weight once, the input, the outputs, and the part of
  each product's result (matrix product, convolution, attention) that the last-level cache cannot hold,
  written once and read once. Operations between two products (norms, softmax, activations,
  interpolation, additions) can be fused and are not counted. Attention scores are not counted either:
  fused attention never stores them.

Measured times include copies between host and device; the roofline does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

# Side of the square matrices and bytes of the copied block: large enough to reach the full rate.
MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
TRIALS = 20
# Seconds after which an idle device has raised its clock.
WARM_UP_S = 0.5

_PRODUCTS = (
    F.linear,
    torch.matmul,
    torch.conv2d,
    torch.conv_transpose2d,
    F.scaled_dot_product_attention,
)


class Rates(NamedTuple):
    """Measured rates of a device.

    Attributes
    ----------
    flops_per_s : float
        Of a large matrix product in ``dtype``.
    bytes_per_s : float
        Of a large copy in the device's memory, read and written bytes together.
    cache_bytes : int
        Last-level cache.
    dtype : str
        ``float16`` on a GPU; ``float32`` on a CPU, which lacks FP16 arithmetic.
    """

    flops_per_s: float
    bytes_per_s: float
    cache_bytes: int
    dtype: str


class Work(NamedTuple):
    """Work of one run of a network.

    Attributes
    ----------
    flops : int
        Floating-point operations.
    weight_bytes, io_bytes, activation_bytes : int
        Memory traffic, as counted in the module's docstring.
    """

    flops: int
    weight_bytes: int
    io_bytes: int
    activation_bytes: int

    @property
    def bytes(self) -> int:
        """All memory traffic."""
        return self.weight_bytes + self.io_bytes + self.activation_bytes

    def roofline_s(self, rates: Rates) -> float:
        """Shortest possible seconds at the measured rates."""
        return max(self.flops / rates.flops_per_s, self.bytes / rates.bytes_per_s)


def total(works: Iterable[Work]) -> Work:
    """The work of several networks run one after another."""
    return Work(*map(sum, zip(*works, strict=True)))


def measure_rates(device: str) -> Rates:
    """Time a matrix product and a copy on ``device``, ``cuda`` or ``cpu``; the fastest trial counts."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    side, size = MATRIX_SIDE[device], COPY_BYTES[device]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    seconds = _best(lambda: torch.matmul(left, right, out=product), device)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source), device)
    return Rates(
        2 * side**3 / seconds, 2 * size / copied, cache_bytes(device), str(dtype).removeprefix("torch.")
    )


def _best(run: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of several runs, after a warm-up."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    best, begin = float("inf"), time.perf_counter()
    trials = 0
    while trials < TRIALS or time.perf_counter() - begin < WARM_UP_S:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        best = min(best, time.perf_counter() - start)
        trials += 1
    return best


def cache_bytes(device: str) -> int:
    """Bytes of the last-level cache; 0 if the system does not report them."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().removesuffix("K")) * 1024 for path in sizes), default=0)


def count_work(network: nn.Module, shape: tuple[int, int, int], cache: int) -> Work:
    """Count the work of one run of a network on the ``meta`` device; nothing is computed.

    Parameters
    ----------
    network : nn.Module
        Maps uint8 [B, 1, H, W, 3] to a tuple of tensors; its dtypes decide the bytes.
    shape : tuple[int, int, int]
        H, W, B.
    cache : int
        Bytes of each result that stay in the cache.
    """
    height, width, batch = shape
    images = torch.empty(batch, 1, height, width, 3, dtype=torch.uint8, device="meta")
    counter, results = FlopCounterMode(display=False), _Results()
    with torch.no_grad(), counter, results:
        outputs = network(images)
    weights = sum(_size(tensor) for tensor in network.parameters())
    spilled = sum(2 * max(0, size - cache) for size in results.sizes)
    return Work(counter.get_total_flops(), weights, _size(images) + sum(map(_size, outputs)), spilled)


class _Results(TorchFunctionMode):
    """Records the bytes of the result of every matrix product, convolution and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _PRODUCTS:
            self.sizes.append(_size(result))
        return result


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
