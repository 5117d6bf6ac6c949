"""Measurements: each prints a table and writes JSON."""

# It sets what must be set before ONNX Runtime is imported.
import da3_runtime as da3_runtime
