"""Acting on heads: streaming attention."""
