"""Model files: finding and fetching them, reading safetensors and GGUF, loading weights into a model."""
