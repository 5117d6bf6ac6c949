"""The verbs of the command ``da3-runtime``, one file each."""
