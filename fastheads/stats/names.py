"""The names of the metrics and aggregations. Does not import torch."""

METRICS = (
    "head_output_norm",
    "head_residual_contribution_norm",
    "relative_head_output_norm",
    "relative_head_residual_contribution_norm",
)
# The norm of what the layer adds to the residual stream for a head (`models.residual`), and the norm of the summed contributions
# of the query heads that share keys and values.
UPDATE_METRIC = "head_residual_update_norm"
KV_METRIC = "kv_group_residual_contribution_norm"
# Of each token: the update norm over the norm of the residual stream that the block's output is added to; and its square.
RATIO_METRIC = "head_residual_ratio"
RATIO_SQUARE_METRIC = "head_residual_ratio_square"
TOKEN_AGGS = ("last", "all", "token")
PRECISIONS = ("exact", "fast")
