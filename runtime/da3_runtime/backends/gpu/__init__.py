"""CUDA plumbing that the GPU backends share."""
