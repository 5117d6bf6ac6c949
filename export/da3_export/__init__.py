"""Building: checkpoint -> torch module -> ONNX -> engine -> parity report."""

# It sets what must be set before ONNX Runtime is imported.
import da3_runtime as da3_runtime

__version__ = "0.2.0"
