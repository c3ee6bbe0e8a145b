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
# The norm of what the layer adds for a head, over that of the residual stream that it is added to, token by token; and its
# square, the root of whose mean is the root mean square.
RATIO_METRIC = "head_residual_ratio"
RATIO_SQUARE_METRIC = "head_residual_ratio_square"
# What is lost in the residual stream, token by token, if a head, or a KV group, sees only the first tokens and the last ones; and
# the squares.
STREAMING_METRIC = "head_streaming_error"
STREAMING_SQUARE_METRIC = "head_streaming_error_square"
KV_STREAMING_METRIC = "kv_group_streaming_error"
KV_STREAMING_SQUARE_METRIC = "kv_group_streaming_error_square"
STREAMING_METRICS = (
    STREAMING_METRIC,
    STREAMING_SQUARE_METRIC,
    KV_STREAMING_METRIC,
    KV_STREAMING_SQUARE_METRIC,
)
# Metrics whose "heads" are KV heads.
KV_METRICS = (KV_METRIC, KV_STREAMING_METRIC, KV_STREAMING_SQUARE_METRIC)
TOKEN_AGGS = ("last", "all", "token")
PRECISIONS = ("exact", "fast")
