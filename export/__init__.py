"""Building: checkpoint -> torch module -> ONNX -> engine -> parity report."""

# It sets what must be set before ONNX Runtime is imported.
import runtime as runtime
