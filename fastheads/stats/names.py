"""The names of what is measured. Importing them needs no torch."""

METRICS = (
    "head_output_norm",
    "head_residual_contribution_norm",
    "relative_head_output_norm",
    "relative_head_residual_contribution_norm",
)
# The norm of what is really added to the residual stream (`models.residual`), and that of what the query heads which share
# keys and values contribute together.
UPDATE_METRIC = "head_residual_update_norm"
KV_METRIC = "kv_group_residual_contribution_norm"
TOKEN_AGGS = ("last", "all", "token")
PRECISIONS = ("exact", "fast")
