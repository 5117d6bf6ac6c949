"""Helpers that are independent of depth estimation."""
