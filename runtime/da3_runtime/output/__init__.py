"""Depth -> files, and where they are put."""
