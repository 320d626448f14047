"""How a linear layer stores and applies its weights: one file per format."""
