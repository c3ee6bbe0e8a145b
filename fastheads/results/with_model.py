"""Methods of `HeadProfile` that compute with its mean vectors and the model's weights."""

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


class WithModel:
    """The methods of `HeadProfile` that need the model, since a profile holds no weights.

    z̄_h is the head's mean output and W_h its part of the output projection's weight. Results are float64 on the CPU, row i of
    `[rows, heads]` is `metadata["sites"][i]`, and heads without tokens are NaN. The adapters that acted in the run must act now.

    Each method raises ResultsError if the profile has no mean vectors or no fingerprint of the weights, or if the weights or what
    the layers do with the attention's output are not the model's; and UnsupportedWeightError if a weight cannot be read, or is
    split over ranks.
    """

    def constant_share(self: Any, model: "nn.Module") -> "Tensor":
        """Return ‖W_h z̄_h‖² / E‖W_h z_h‖², the constant share of what each head writes: `[rows, heads]`, 0 to 1.

        NaN where a head writes nothing.
        """
        from fastheads.results import vectors

        return vectors.constant_share(self, model)

    def mean_ablation_error(self: Any, model: "nn.Module") -> "Tensor":
        """Return E‖W_h z_h - W_h z̄_h‖² = E‖W_h z_h‖² - ‖W_h z̄_h‖² = tr(W_h Cov W_hᵀ): `[rows, heads]`.

        NaN where the difference is below the rounding error of E‖W_h z_h‖²: it is known only to be smaller than about
        3e-5 ‖W_h‖₂ √(E‖W_h z_h‖² E‖z_h‖²), and than 0.8 % of E‖W_h z_h‖² with precision "fast".
        """
        from fastheads.results import vectors

        return vectors.mean_ablation_error(self, model)

    def mean_ablation_error_ratio(self: Any, model: "nn.Module") -> "Tensor":
        """Return the root of the mean-ablation error per residual: √tr(W_h Cov W_hᵀ) E[ratio] / E‖W_h z_h‖, `[rows, heads]`.

        E[ratio] and E‖W_h z_h‖ are the means of head_residual_ratio and head_residual_contribution_norm. NaN, with a warning,
        in layers that put a norm on the attention's output, whose scale varies by token, or do something unknown to it; and
        where `mean_ablation_error` is.

        Raises:
            ResultsError: the profile lacks one of the two metrics; also as all methods here.
        """
        from fastheads.results import vectors

        return vectors.mean_ablation_error_ratio(self, model)

    def mean_bias(self: Any, model: "nn.Module", heads: Iterable[tuple[int, int]]) -> "dict[int, Tensor]":
        """Return by layer the sum of W_h z̄_h over those of `heads`, pairs of layer and head, in it: `[hidden_size]`.

        Added to the output of the layer's projection when those heads are zeroed, it makes their ablation a mean ablation.

        Raises:
            OptionError: a pair names no head of the profile, or a layer with several output projections.
            ResultsError: a head has no tokens; also as all methods here.
        """
        from fastheads.results import vectors

        return vectors.mean_bias(self, model, heads)

    def project(
        self: Any, directions: "Tensor | Sequence[int] | str | os.PathLike[str]", *, model: "nn.Module"
    ) -> "Tensor":
        """Project the mean of what the layer adds to the residual stream for each head on n directions: `[rows, heads, n]`.

        That is c W_h z̄_h · d, with c the layer's multiplier, mostly 1. NaN, with a warning, in layers that put a norm on the
        attention's output or do something unknown to it.

        Args:
            directions: of the residual stream: floating point `[n, hidden_size]`; the path of a safetensors file with one such
                tensor; or token ids. These stand for rows of the unembedding times the final norm's gain, centred for a
                LayerNorm: what a head adds to the token's logit, up to the norm's scale (which varies by token), and to what
                the model does with logits afterwards; both are left out.
            model: the model that was profiled.

        Raises:
            OptionError: `directions` do not fit; or token ids are given, and the model's final norm or unembedding is unknown.
            DataError: the file does not hold one tensor of directions.
            OSError: the file cannot be read.
        """
        from fastheads.results import vectors

        return vectors.project(self, directions, model)
