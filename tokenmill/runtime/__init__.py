"""Runs batch plans: loading, memory plan, state by slot, runners of models and of programs; and `Session`."""
