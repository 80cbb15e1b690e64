"""How unsure a network is of each pixel, and percentiles over all ranks' pixels without sorting them.

Axes: B images, K classes, H x W pixels. Nothing here carries a gradient or waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_BINS = 2048
_OCTAVES, _PER_OCTAVE = 24, 32


@torch.no_grad()
def entropy(logits_BKHW: Tensor) -> Tensor:
    """-sum_k p_k ln(p_k + 1e-10) with p the softmax over classes.

    Returns:
        [B, H, W] in nats, 0 (sure) to ln K; float32 (float64 for float64 logits).
    """
    logits_BKHW = logits_BKHW if logits_BKHW.dtype == torch.float64 else logits_BKHW.float()
    probability_BKHW = logits_BKHW.softmax(dim=1)
    return -(probability_BKHW * (probability_BKHW + 1e-10).log()).sum(dim=1)


@torch.no_grad()
def percentiles(
    values_BHW: Tensor,
    counted_BHW: Tensor,
    percents: Sequence[float],
    top: float,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Percentiles over the counted pixels of all ranks, interpolated between the two nearest values as NumPy does.

    Read from a histogram that is summed over ranks, so that any number of ranks gives the same numbers: 2,048 bins over
    [0, top], the first of them once more divided, 32 bins an octave. A percentile is off by less than its bin: by less
    than top / 2,048, and below that by 2 % of itself, so that nearly sure pixels, of which a trained network has most,
    are told apart too. Values of one bin are taken to be evenly spread over it.

    Args:
        values_BHW: in [0, top].
        counted_BHW: bool; the other pixels are left out.
        percents: each in [0, 100].
        top: largest value that there can be.
        sum_over_ranks: adds an int64 tensor up over ranks; default: this is the only rank.

    Returns:
        One number for each of `percents`, in the dtype of the values; within [0, top], but meaningless, when no pixel
        is counted.
    """
    edge_E = _edges(top, values_BHW)
    num_bins = len(edge_E) - 1
    bin_BHW = torch.bucketize(values_BHW.contiguous(), edge_E[1:-1], right=True)
    slot_BHW = torch.where(counted_BHW, bin_BHW, num_bins)
    counts = torch.zeros(num_bins + 1, dtype=torch.int64, device=values_BHW.device)
    counts = counts.scatter_add_(0, slot_BHW.flatten(), torch.ones_like(slot_BHW).flatten())[:num_bins]
    counts = counts if sum_over_ranks is None else sum_over_ranks(counts)
    reached = counts.cumsum(0)
    wide = torch.float32 if counts.device.type == "mps" else torch.float64  # MPS has no fp64
    last = (reached[-1:] - 1).clamp(min=0).to(wide)
    position_P = torch.cat([last * (percent / 100.0) for percent in percents])
    lower_P, upper_P = position_P.floor().long(), position_P.ceil().long()

    def ranked(place_P: Tensor) -> Tensor:
        bin_P = torch.searchsorted(reached, place_P, right=True).clamp(max=num_bins - 1)
        share_P = (place_P - (reached - counts)[bin_P] + 0.5) / counts[bin_P].clamp(min=1)
        low_P, high_P = edge_E[bin_P].to(wide), edge_E[bin_P + 1].to(wide)
        return low_P + share_P * (high_P - low_P)

    lowest_P = ranked(lower_P)
    value_P = lowest_P + (ranked(upper_P) - lowest_P) * (position_P - lower_P)
    return value_P.to(values_BHW.dtype)


def _edges(top: float, like: Tensor) -> Tensor:
    """Ends of the bins, ascending from 0 to `top`."""
    even_E = torch.arange(1, _BINS + 1, dtype=like.dtype, device=like.device) * (top / _BINS)
    octave_E = torch.arange(1 - _OCTAVES * _PER_OCTAVE, 0, dtype=like.dtype, device=like.device) / _PER_OCTAVE
    return torch.cat((even_E.new_zeros(1), octave_E.exp2() * (top / _BINS), even_E))
