"""The backends, best first. Adding one is one file and one row here."""

from __future__ import annotations

from runtime.backends.base import Backend
from runtime.backends.eager import Eager, EagerCuda
from runtime.backends.onnxruntime import OnnxRuntimeCpu
from runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda, OnnxRuntimeTensorRT
from runtime.backends.tensorrt import TensorRT, TensorRTRTX

BACKENDS: tuple[type[Backend], ...] = (
    TensorRT,
    TensorRTRTX,
    OnnxRuntimeCuda,
    OnnxRuntimeTensorRT,
    EagerCuda,
    OnnxRuntimeCpu,
    Eager,
)
