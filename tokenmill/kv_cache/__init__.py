"""The paged cache of keys and values: who holds which block (no torch here), and the tensors themselves."""
