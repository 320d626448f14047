"""Process groups and collectives: how several ranks share one model."""
