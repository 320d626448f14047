"""From callers to engines: `GenerationExecutor` takes requests, `GenerationResult` gives their tokens back."""
