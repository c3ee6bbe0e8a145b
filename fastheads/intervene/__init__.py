"""Acting on heads: ablation."""
