"""Statistics, summaries of latencies, Prometheus metrics."""
