"""What `tokenmill bench` runs: workloads, a client that drives `LLM` and measures it, reports, profiles."""
