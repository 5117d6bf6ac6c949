"""The table of backends, best first. A new backend is one file in this folder and one row here."""

from __future__ import annotations

from da3_runtime.backends.base import Backend
from da3_runtime.backends.eager import Eager, EagerCuda
from da3_runtime.backends.onnxruntime import OnnxRuntimeCpu
from da3_runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda, OnnxRuntimeTensorRT
from da3_runtime.backends.openvino import OpenVino
from da3_runtime.backends.tensorrt import TensorRT, TensorRTRTX

BACKENDS: tuple[type[Backend], ...] = (
    TensorRT,
    TensorRTRTX,
    OnnxRuntimeCuda,
    OnnxRuntimeTensorRT,
    EagerCuda,
    OpenVino,
    OnnxRuntimeCpu,
    Eager,
)
