"""Runs batch plans: model loading, memory plan, per-slot state on the device, the model runner."""
