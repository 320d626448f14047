"""One typed function per op, a plain-torch reference beside it, and a table of implementations to choose from.

Each file has the same shape: `op(...)` is what layers call; `op_reference(...)` is the definition that tests trust;
`IMPLEMENTATIONS` maps a name to a function of the same signature; `choose(device, dtype)` names the one to use. A
faster version (Triton, a CPU kernel) is a new entry in the table and a line in `choose`; nothing else changes.
"""
