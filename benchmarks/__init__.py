"""Benchmarks. Each module measures one thing, prints a table and writes a JSON file."""

# Sets environment variables that must be set before ONNX Runtime is imported.
import da3_runtime as da3_runtime
