"""What is measured, and how it adds up: metrics, token layout, running moments, confidence."""
