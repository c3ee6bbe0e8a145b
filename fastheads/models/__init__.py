"""Inspect a model: attention sites, heads, dense weights, residual updates, fingerprints."""
