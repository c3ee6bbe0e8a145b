"""Running mean vectors: of each head's output z, and of the squared norms ‖z‖² and ‖W z‖², all over the same tokens.

Every token has weight one, whatever the weights of the sequences are in the moments: only then is E‖W z‖² - ‖W E z‖² a variance.
Batches merge by weighted means, mean = mean_a + (mean_b - mean_a) n_b / n. Counts are int64 and the rest float64.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

COUNT, NONFINITE, POWER, OUTPUT_POWER, MEAN = range(
    5
)  # places in the buffer's last dimension; from MEAN on the vector

# Elements of z to widen to float64 at a time: 32 MiB.
SCRATCH_ELEMENTS = 2**22


class MeanVectorPlanes(NamedTuple):
    """Counts of tokens, and means over them, of each head's output z. With count 0, the means are 0."""

    count: Tensor  # type: ignore[assignment]  # int64 [...]: tokens with finite z and ‖W z‖² (hides tuple.count)
    nonfinite: Tensor  # int64 [...]: the other tokens, excluded from the means
    power: Tensor  # float64 [...]: mean of ‖W z‖²
    output_power: Tensor  # float64 [...]: mean of ‖z‖²
    mean: Tensor  # float64 [..., head_dim]: mean of z


class RunningMeanVectors:
    """The mean vectors of `rows × heads` heads in one buffer on one device.

    `buffer` is float64 `[rows, heads, 4 + head_dim]`: of each head the two counts (int64 bits), the mean of ‖W z‖², the mean of
    ‖z‖², the mean of z. With one buffer the whole state is copied at once, and a kernel takes one pointer. Rows with fewer heads
    or a smaller head_dim leave the rest at 0.
    """

    def __init__(self, rows: int, heads: int, head_dim: int, device: torch.device) -> None:
        device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        with torch.inference_mode(False):  # an inference tensor could not be updated outside inference mode
            self.buffer = torch.zeros(rows, heads, MEAN + head_dim, dtype=torch.float64, device=device)

    @classmethod
    def over(cls, buffer: Tensor) -> Self:
        """Wrap an existing `buffer`, sharing its memory."""
        vectors = cls.__new__(cls)
        vectors.buffer = buffer
        return vectors

    def views(self) -> MeanVectorPlanes:
        """Return the planes `[rows, heads]`, the mean `[rows, heads, head_dim]`; they share the buffer's memory."""
        counts = self.buffer[..., :POWER].view(torch.int64)
        return MeanVectorPlanes(
            counts[..., COUNT],
            counts[..., NONFINITE],
            self.buffer[..., POWER],
            self.buffer[..., OUTPUT_POWER],
            self.buffer[..., MEAN:],
        )

    def update(
        self, rows: slice | list[int], z: Tensor, power: Tensor, present: Tensor | None = None
    ) -> None:
        """Merge N tokens of G rows: `z` `[G, N, h ≤ heads, d ≤ head_dim]` and ‖W z‖² as `power` `[G, N, h]`, without those where
        `present`, bool `[N]`, is False.

        Where z or its power is not finite the token is left out for that head and counted in `nonfinite`. Never waits for the
        device.
        """
        _, tokens, heads, head_dim = z.shape
        if tokens == 0:
            return
        with torch.no_grad():
            new = self._of_tokens(z, power, present)
            place = (rows, slice(heads), slice(MEAN + head_dim))
            self.buffer[place] = merged_buffers(self.buffer[place], new)

    def _of_tokens(self, z: Tensor, power: Tensor, present: Tensor | None) -> Tensor:
        """Reduce `z` `[G, N, h, d]`, `power` `[G, N, h]` to `[G, h, 4 + d]`, without tokens where `present` `[N]` is False."""
        groups, tokens, heads, head_dim = z.shape
        total = self.buffer.new_zeros(groups, heads, MEAN + head_dim)
        counts = total[..., :POWER].view(torch.int64)
        step = max(1, SCRATCH_ELEMENTS // (groups * heads * head_dim))
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            of_part = z[:, part].to(total.device)
            powers = power[:, part].to(total.device).double()
            outputs = torch.linalg.vector_norm(of_part, dim=-1, dtype=torch.float64).square()
            finite = powers.isfinite() & outputs.isfinite()
            left_out = ~finite
            if present is not None:
                here = present[part].to(total.device, non_blocking=True).unsqueeze(-1)  # [n, 1]
                finite, left_out = finite & here, left_out & here
            counts[..., COUNT] += finite.sum(1)
            counts[..., NONFINITE] += left_out.sum(1)
            # Select rather than multiply by zero: 0 · NaN is NaN.
            total[..., POWER] += torch.where(finite, powers, 0.0).sum(1)
            total[..., OUTPUT_POWER] += torch.where(finite, outputs, 0.0).sum(1)
            total[..., MEAN:] += torch.where(finite.unsqueeze(-1), of_part, 0.0).sum(1, dtype=torch.float64)
        total[..., POWER:] /= counts[..., :1].clamp(min=1)
        return total


def merged_buffers(one: Tensor, other: Tensor) -> Tensor:
    """Merge two buffers `[..., 4 + head_dim]` into a new one. Merging with an empty side is exact."""
    counts, other_counts = (buffer[..., :POWER].view(torch.int64) for buffer in (one, other))
    merged = torch.empty_like(one)
    total = counts + other_counts
    merged[..., :POWER].view(torch.int64).copy_(total)
    n_one, n_other, n = (c[..., :1] for c in (counts, other_counts, total))
    mean, other_mean = one[..., POWER:], other[..., POWER:]
    both = mean + (other_mean - mean) * (n_other / n.clamp(min=1).double())
    merged[..., POWER:] = torch.where(n_other == 0, mean, torch.where(n_one == 0, other_mean, both))
    return merged
