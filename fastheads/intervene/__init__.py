"""Act on heads: silence them while a model runs, let them see a window alone, and prune them for good."""
