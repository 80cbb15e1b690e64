"""Pairwise similarity maps of pixel features and of their derivatives along the channels, never stored whole.

A map is a product of two factors, A = L' R with L, R [B, C, N]: scales, norms and temperatures are folded into the
factors, which are small, and whatever needs the N x N entries walks over blocks of rows. A block gives its share of the
gradient at once or is made again in the backward pass: memory is O(block * N) in both directions.

Axes: B images, D channels of a projection, C channels of a factor, N = h * w cells, S rows, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from raysemi.errors import ConfigError

Similarity = Literal["softmax_dot", "cosine", "l1_dot"]

FORWARD_DIFFERENCE = (-1.0, 1.0)
_EPSILON = 1e-8
_BLOCK_CPU = 2**17  # entries of a block: one that stays in a core's cache
_BLOCK_GPU = 2**24  # few launches, 64 MB


def remaining_channels(channels: int, order: int, kernel: Sequence[float] = FORWARD_DIFFERENCE) -> int:
    """D_n = D - n (L - 1): channels left after `order` applications of a kernel of length L; may be below 1."""
    return channels - order * (len(kernel) - 1)


def channel_derivative(
    features_BDN: Tensor, order: int = 1, kernel: Sequence[float] = FORWARD_DIFFERENCE, absolute: bool = False
) -> Tensor:
    """Discrete derivative along the channels, applied `order` times: (Op f)[k] = sum_j kernel[j] f[k + j].

    Args:
        features_BDN: [B, D, ...] features of any float dtype.
        order: number of applications, from 0.
        kernel: coefficients; only positions where the whole kernel fits are kept.
        absolute: take the absolute value after each application.

    Returns:
        [B, D - order * (len(kernel) - 1), ...].

    Raises:
        ConfigError: no channel would be left.

    Source: Derivative Label Propagation, eq. 2 (default kernel), 10 (-1, 0, 1), 11 (1, 1).
    """
    if order < 0 or remaining_channels(features_BDN.shape[1], order, kernel) < 1:
        raise ConfigError(
            f"order must leave at least one of the {features_BDN.shape[1]} channels with a kernel of {len(kernel)}; "
            f"got {order}. Lower the order, or project to more channels"
        )
    for _ in range(order):
        length = features_BDN.shape[1] - len(kernel) + 1
        result = features_BDN.narrow(1, 0, length) * kernel[0]
        for j, coefficient in enumerate(kernel[1:], start=1):
            if coefficient != 0:
                result = torch.add(result, features_BDN.narrow(1, j, length), alpha=coefficient)
        features_BDN = result.abs() if absolute else result
    return features_BDN


def normalise(features_BDN: Tensor, similarity: Similarity) -> Tensor:
    """nu over the channels: softmax for `softmax_dot`, f / (|f|_1 + 1e-8) for `cosine` and `l1_dot`; at least fp32."""
    features_BDN = at_least_fp32(features_BDN)
    if similarity == "softmax_dot":
        return features_BDN.softmax(dim=1)
    return features_BDN / (features_BDN.abs().sum(dim=1, keepdim=True) + _EPSILON)


def similarity_factor(
    features_BDN: Tensor,
    order: int,
    similarity: Similarity = "softmax_dot",
    kernel: Sequence[float] = FORWARD_DIFFERENCE,
    absolute: bool = False,
) -> Tensor:
    """One side of the similarity map of an order: A^(n) = factor(f1)' factor(f2).

    softmax_dot: softmax(Op^n f) / D_n^(1/4), differenced first. cosine: Op^n nu(f) / |Op^n nu(f)|_2, normalised first.
    l1_dot: Op^n nu(f).

    Returns:
        [B, D_n, N], at least fp32.
    """
    if similarity == "softmax_dot":
        derived_BDN = normalise(channel_derivative(features_BDN, order, kernel, absolute), similarity)
        return derived_BDN * derived_BDN.shape[1] ** -0.25
    derived_BDN = channel_derivative(normalise(features_BDN, similarity), order, kernel, absolute)
    return F.normalize(derived_BDN, dim=1, eps=_EPSILON) if similarity == "cosine" else derived_BDN


def propagation_factor(
    features_BDN: Tensor,
    order: int,
    *,
    similarity: Similarity | None = None,
    temperature: float = 1.0,
    kernel: Sequence[float] = FORWARD_DIFFERENCE,
    absolute: bool = False,
) -> Tensor:
    """One side of S = (sum over n = 0..order of the map of order n) / temperature, whose row softmax propagates.

    Args:
        features_BDN: raw projection.
        order: largest order that is summed.
        similarity: None takes raw products, Op^n f1 . Op^n f2 / sqrt(D_n) (the reference); a name takes A^(n) (paper).
        temperature: above 0; `cosine` needs about 0.1, entries that differ by 4 at most make an almost uniform map.

    Returns:
        [B, sum of D_n, N], at least fp32: one product gives the whole sum.

    Source: Derivative Label Propagation, eq. 4.
    """
    features_BDN = at_least_fp32(features_BDN)
    parts = []
    for n in range(order + 1):
        if similarity is None:
            derived_BDN = channel_derivative(features_BDN, n, kernel, absolute)
            parts.append(derived_BDN * derived_BDN.shape[1] ** -0.25)
        else:
            parts.append(similarity_factor(features_BDN, n, similarity, kernel, absolute))
    return torch.cat(parts, dim=1) * temperature**-0.5


def label_scale(channels: int, similarity: Similarity) -> float:
    """t, the similarity that two pixels of one class should have: that of identical one-hot features.

    Args:
        channels: D_n of the order.
        similarity: which map.
    """
    return channels**-0.5 if similarity == "softmax_dot" else 1.0


def label_factor(labels_BN: Tensor, num_classes: int, scale: float) -> Tensor:
    """Both sides of the target map T_ij = scale * [label_i = label_j]; a label outside 0..K-1 equals nothing.

    Returns:
        float32 [B, K, N].
    """
    classes_K = torch.arange(num_classes, device=labels_BN.device)
    return (labels_BN[:, None, :] == classes_K[None, :, None]).to(torch.float32) * math.sqrt(scale)


def map_distance(
    left_BCN: Tensor, right_BCN: Tensor, target_left_BEN: Tensor, target_right_BEN: Tensor, counted_BN: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum over counted pairs of |A_ij - T_ij|, A = left' right, T = target_left' target_right, and the number of pairs.

    Args:
        left_BCN, right_BCN: factors of the map that learns; the gradient is exact, 0 where A = T.
        target_left_BEN, target_right_BEN: factors of the map it should match; no gradient.
        counted_BN: bool; a pair counts when both its cells do.

    Returns:
        total: scalar, at least fp32, under autocast too. pairs: scalar of that dtype, without gradient.

    Source: Derivative Label Propagation, eqs. 8-9.
    """
    left_BCN, right_BCN = at_least_fp32(left_BCN), at_least_fp32(right_BCN)
    target_left_BEN = target_left_BEN.detach().to(left_BCN.dtype)
    target_right_BEN = target_right_BEN.detach().to(left_BCN.dtype)
    learn = torch.is_grad_enabled() and (left_BCN.requires_grad or right_BCN.requires_grad)
    weight_BN = counted_BN.to(left_BCN.dtype)
    total = _MapDistance.apply(left_BCN, right_BCN, target_left_BEN, target_right_BEN, weight_BN, learn)
    return total, counted_BN.sum(dim=1).square().sum().to(left_BCN.dtype)


def propagate(logits_BKN: Tensor, left_BCN: Tensor, right_BCN: Tensor) -> Tensor:
    """Logits spread along a map: zc[k, j] = sum_i z[k, i] M[i, j], M = softmax over j of (left' right)[i, j].

    Source cell i hands out mass 1 over the targets j; a target may receive more or less than 1. The logits get no
    gradient: what supervises zc trains the projections and the encoder, never the classifier.

    Returns:
        [B, K, N], at least fp32, under autocast too.

    Source: Sun et al. 2024 (CorrMatch), eqs. 3-4; Derivative Label Propagation, eq. 4.
    """
    left_BCN, right_BCN = at_least_fp32(left_BCN), at_least_fp32(right_BCN)
    return _Propagate.apply(logits_BKN.detach().to(left_BCN.dtype), left_BCN, right_BCN)


def collect(logits_BKN: Tensor, left_BCN: Tensor, right_BCN: Tensor) -> Tensor:
    """As `propagate`, but each target takes a mean: M = softmax over i of (left' right)[i, j], columns add up to 1.

    Logits that are the same everywhere stay as they are; this is attention, with targets as queries.

    Returns:
        [B, K, N], at least fp32, under autocast too.
    """
    query_BNC, key_BNC = at_least_fp32(right_BCN).mT, at_least_fp32(left_BCN).mT
    value_BNK = logits_BKN.detach().to(query_BNC.dtype).mT
    with torch.autocast(query_BNC.device.type, enabled=False):
        return F.scaled_dot_product_attention(query_BNC, key_BNC, value_BNK, scale=1.0).mT


@torch.no_grad()
def map_rows(left_BCN: Tensor, right_BCN: Tensor, rows_S: Tensor) -> Tensor:
    """Rows of the map that `propagate` uses, the same of every image: [B, S, N], without gradient."""
    left_BCN, right_BCN = at_least_fp32(left_BCN), at_least_fp32(right_BCN)
    with torch.autocast(left_BCN.device.type, enabled=False):
        return torch.bmm(left_BCN.index_select(2, rows_S).mT, right_BCN).softmax(dim=2)


@torch.no_grad()
def segments(rows_BShw: Tensor, height: int, width: int) -> Tensor:
    """Class-agnostic shapes from rows of a map: resized, min-max normalised over their own pixels, then > 0.5.

    A constant row has no shape and gives an empty one.

    Args:
        rows_BShw: float, rows reshaped to cells.
        height, width: pixels; bilinear with aligned corners.

    Returns:
        bool [B, S, height, width].
    """
    num_images, num_rows, h, w = rows_BShw.shape
    # aligned corners meet every node when the sizes fit: then the extremes of the small row are those of the large one
    nodes_met = (height - 1) % max(h - 1, 1) == 0 and (width - 1) % max(w - 1, 1) == 0
    shapes_BSHW = torch.empty(num_images, num_rows, height, width, dtype=torch.bool, device=rows_BShw.device)
    chunk = max(1, _block_entries(rows_BShw.device) // (num_images * height * width))
    for start in range(0, num_rows, chunk):
        part_BShw = rows_BShw[:, start : start + chunk]
        part_BSHW = F.interpolate(part_BShw, size=(height, width), mode="bilinear", align_corners=True)
        measured = part_BShw if nodes_met else part_BSHW
        low_BS11, high_BS11 = measured.amin(dim=(2, 3), keepdim=True), measured.amax(dim=(2, 3), keepdim=True)
        # asked of the cells: interpolation rounds, and a constant row would get a shape of noise
        varies_BS11 = part_BShw.amax(dim=(2, 3), keepdim=True) > part_BShw.amin(dim=(2, 3), keepdim=True)
        middle_BS11 = torch.where(varies_BS11, low_BS11 + 0.5 * (high_BS11 - low_BS11), math.inf)
        torch.gt(part_BSHW, middle_BS11, out=shapes_BSHW[:, start : start + chunk])
    return shapes_BSHW


class _MapDistance(torch.autograd.Function):
    """sum_ij w_i w_j |L_i . R_j - TL_i . TR_j|, with its gradient made block by block in the forward pass.

    The loss is a scalar, so its gradient for the factors is known up to one number when the block is there; keeping
    it costs what saving the factors would, and spares making every block a second time.
    """

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, target_left: Tensor, target_right: Tensor, weight_BN: Tensor, learn: bool
    ) -> Tensor:
        with torch.autocast(left.device.type, enabled=False):
            # A - T is one product: [L; -TL]' [R; TR]
            both_left, both_right = torch.cat((left, -target_left), dim=1), torch.cat((right, target_right), dim=1)
            weighted_left, weighted_right = left * weight_BN[:, None], right * weight_BN[:, None]
            total = left.new_zeros(())
            grad_left = torch.empty_like(left, memory_format=torch.contiguous_format) if learn else None
            grad_right = torch.zeros_like(right, memory_format=torch.contiguous_format) if learn else None
            for rows in _row_blocks(left):
                residual_BRN = torch.bmm(both_left[:, :, rows].mT, both_right)
                if grad_left is not None and grad_right is not None:
                    sign_BRN = residual_BRN.sign()
                    grad_left[:, :, rows] = torch.bmm(weighted_right, sign_BRN.mT)
                    grad_right.baddbmm_(weighted_left[:, :, rows], sign_BRN)
                row_sums_BR = torch.bmm(residual_BRN.abs_(), weight_BN[:, :, None])[:, :, 0]
                total = total + (row_sums_BR * weight_BN[:, rows]).sum()
            if grad_left is not None and grad_right is not None:
                ctx.save_for_backward(grad_left.mul_(weight_BN[:, None]), grad_right.mul_(weight_BN[:, None]))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_left, grad_right = ctx.saved_tensors
        return grad * grad_left, grad * grad_right, None, None, None, None


class _Propagate(torch.autograd.Function):
    """z x softmax(L' R), row blocks made again in the backward pass; saves its inputs only."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(logits, left, right)
        with torch.autocast(left.device.type, enabled=False):
            spread_BKN = torch.zeros_like(logits, memory_format=torch.contiguous_format)
            for rows in _row_blocks(left):
                spread_BKN.baddbmm_(logits[:, :, rows], torch.bmm(left[:, :, rows].mT, right).softmax(dim=2))
        return spread_BKN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, left, right = ctx.saved_tensors
        with torch.autocast(left.device.type, enabled=False):
            grad_left = torch.empty_like(left, memory_format=torch.contiguous_format)
            grad_right = torch.zeros_like(right, memory_format=torch.contiguous_format)
            for rows in _row_blocks(left):
                map_BRN = torch.bmm(left[:, :, rows].mT, right).softmax(dim=2)
                inner_BRN = torch.bmm(logits[:, :, rows].mT, grad).mul_(map_BRN)
                inner_BRN.sub_(map_BRN.mul_(inner_BRN.sum(dim=2, keepdim=True)))  # softmax backward
                grad_left[:, :, rows] = torch.bmm(right, inner_BRN.mT)
                grad_right.baddbmm_(left[:, :, rows], inner_BRN)
        return None, grad_left, grad_right


def at_least_fp32(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, others as they are: maps and confidences need the digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _block_entries(device: torch.device) -> int:
    return _BLOCK_CPU if device.type == "cpu" else _BLOCK_GPU


def _row_blocks(factor_BCN: Tensor) -> Iterator[slice]:
    num_images, _, cells = factor_BCN.shape
    height = max(1, _block_entries(factor_BCN.device) // max(1, num_images * cells))
    return (slice(start, min(start + height, cells)) for start in range(0, cells, height))
