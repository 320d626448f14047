"""Turns logits into tokens on the device: `Sampler` and the pure steps that it is composed of."""
