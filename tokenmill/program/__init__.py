"""A model compiled to a program: what `builder/` writes, an engine directory holds and `runtime/` executes."""
