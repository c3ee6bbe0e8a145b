"""Statistics: metrics, token layout, running moments, confidence."""
