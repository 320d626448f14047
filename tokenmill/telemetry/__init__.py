"""Statistics, Prometheus metrics, profiler hooks."""
