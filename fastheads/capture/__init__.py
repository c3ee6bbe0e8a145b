"""Take the inputs of projections during forwards: hooks, the life of a forward, deferral, torch.compile, the self-check."""
