"""A loaded model and how requests share it."""
