"""How linear layers and experts store and apply their weights: one file per format."""
