"""The PyTorch network: the eager backend runs it, and the exporter traces it.

Only this folder and ``backends/eager`` import torch. Load it lazily.
"""
