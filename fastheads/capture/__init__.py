"""HookManager: hooks, the life of one forward, deferral, torch.compile, the self-check."""
