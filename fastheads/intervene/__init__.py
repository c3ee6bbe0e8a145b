"""Act on heads: silence them while a model runs, and prune them for good."""
