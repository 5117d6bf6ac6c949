"""CUDA memory, streams and graphs, as the GPU backends share them."""
