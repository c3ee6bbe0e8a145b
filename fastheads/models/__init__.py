"""What a model is made of: attention sites, heads, dense weights, residual updates, fingerprints."""
