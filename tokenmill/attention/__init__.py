"""Attention backends: one file each, chosen once by `select.py`."""
