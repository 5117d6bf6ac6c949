"""Helpers that know nothing of depth."""
