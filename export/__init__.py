"""Building: checkpoint -> torch module -> ONNX -> engine -> parity report."""
