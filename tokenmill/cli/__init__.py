"""The command line: one file for each command, on the public `LLM` API."""
