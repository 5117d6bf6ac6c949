"""Depth -> files, and the places that store them."""
