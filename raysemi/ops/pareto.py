"""Two gradients -> one direction: the weights of the shortest point between them, its length, and the guards.

Everything here is made of three numbers: ss = |g_s|^2, uu = |g_u|^2, su = g_s . g_u. With alpha_s + alpha_u = 1 the
direction is h = alpha_s g_s + alpha_u g_u, the step scale * h. Scalars stay on their device; no line waits for it.

Source: "Two Losses, One Goal: Balancing Conflict Gradients for Semi-supervised Semantic Segmentation" (ICCV 2025),
eq. 6 (the weights) and its magnitude enhancement. Differs: the guards of `mix`, about which the paper is silent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Entries of a gradient that are widened to fp64 at a time: 2 x 32 MiB."""
_EQUAL = 1e-12
"""Squared length, relative to what it is the difference of, below which a difference is rounding and no direction."""


class Products(NamedTuple):
    """Inner products of the two gradients, 0-dim."""

    ss: Tensor
    uu: Tensor
    su: Tensor


class Mix(NamedTuple):
    """The step scale * (alpha_s g_s + alpha_u g_u), 0-dim each."""

    alpha_s: Tensor
    alpha_u: Tensor
    scale: Tensor
    """Factor on the direction; 0 where the two gradients cancel out."""
    fallback: Tensor
    """Bool: one gradient (almost) vanishes, the mix is uniform."""
    capped: Tensor
    """Bool: the factor was cut, to its largest value or to 0."""


def inner_products(gradients_2P: Tensor) -> Tensor:
    """(ss, uu, su) of two flat gradients, summed in fp64: of similar ones, fp32 would lose all of ss + uu - 2 su.

    Args:
        gradients_2P: supervised and unsupervised gradient.

    Returns:
        float64 [3] on their device (float32 on MPS, which has nothing wider).
    """
    total = torch.zeros(3, dtype=_wide(gradients_2P.device), device=gradients_2P.device)
    for part_2P in gradients_2P.split(_CHUNK, dim=1):
        s, u = part_2P.to(total.dtype)
        total += torch.stack((s @ s, u @ u, s @ u))
    return total


def pareto_weights(ss: Tensor | float, uu: Tensor | float, su: Tensor | float) -> tuple[Tensor, Tensor]:
    """The point of least norm on the segment between two gradients: alpha_u = clip((ss - su) / (ss + uu - 2 su), 0, 1).

    Args:
        ss: squared norm of the supervised gradient.
        uu: squared norm of the unsupervised gradient.
        su: their inner product.

    Returns:
        (alpha_s, alpha_u), fp64 with sum 1; (0.5, 0.5) when the two gradients are equal.

    Source: eq. 6 of the paper; its three cases are the clipping.
    """
    ss, uu, su = _scalars(ss, uu, su)
    apart = ss + uu - 2.0 * su
    alpha_u = ((ss - su) / apart).clamp(0.0, 1.0)
    alpha_u = torch.where(apart <= _EQUAL * (ss + uu), 0.5, alpha_u)
    return 1.0 - alpha_u, alpha_u


def mixed_norm(alpha_s: Tensor | float, alpha_u: Tensor | float, products: Products) -> Tensor:
    """|alpha_s g_s + alpha_u g_u|."""
    ss, uu, su = products
    return (alpha_s**2 * ss + alpha_u**2 * uu + 2.0 * alpha_s * alpha_u * su).clamp(min=0.0).sqrt()


def magnitude(alpha_s: Tensor, alpha_u: Tensor, products: Products) -> Tensor:
    """MEO's factor lambda = |(g_s + g_u) / 2| / |h|: the step gets the length that uniform weights would have given.

    At the weights of `pareto_weights` it is 1 or more, for h is the shortest point and the middle one of many; infinite
    or NaN where h is 0.
    """
    return mixed_norm(0.5, 0.5, products) / mixed_norm(alpha_s, alpha_u, products)


def least_cosine(weight_s: Tensor, weight_u: Tensor, products: Products) -> Tensor:
    """The smaller cosine of weight_s g_s + weight_u g_u with g_s and with g_u; below 0 the step hurts one side."""
    ss, uu, su = products
    with_s = (weight_s * ss + weight_u * su) / ss.sqrt()
    with_u = (weight_s * su + weight_u * uu) / uu.sqrt()
    return torch.minimum(with_s, with_u) / mixed_norm(weight_s, weight_u, products)


def mix(
    products: Products,
    metric: Products | None = None,
    *,
    meo: bool = True,
    min_ratio: float = 1e-3,
    max_scale: float | None = 10.0,
) -> Mix:
    """Weights and factor of a step, with guards where the closed form has no answer or a harmful one.

    - One gradient (almost) vanishes, min(|g_s|, |g_u|) <= min_ratio * max(...): uniform weights. The closed form would
      give the vanished one all the weight: with no confident pixel yet, g_u = 0, nothing would ever be learned.
    - The two are equal: uniform weights, which are as good as any.
    - They cancel out, |h| being rounding: factor 0. Nearly so: the factor is at most `max_scale`.
    - What is not finite stays so, for whoever skips the step to see.

    Args:
        products: of the gradients, in the plain metric, in which lengths are measured.
        metric: of the gradients, in the metric of the weights; default: the same.
        meo: scale to the length of the uniform step; without, the factor is 1.
        min_ratio: in [0, 1]; 0 = only a gradient that is 0 counts as vanished, 1 = always uniform.
        max_scale: largest factor; None = no limit, as in the paper.
    """
    products = Products(*_scalars(*products))
    ss, uu, _ = products
    alpha_s, alpha_u = pareto_weights(*(products if metric is None else metric))
    fallback = torch.minimum(ss, uu) <= min_ratio**2 * torch.maximum(ss, uu)
    alpha_s, alpha_u = torch.where(fallback, 0.5, alpha_s), torch.where(fallback, 0.5, alpha_u)

    # Relative to the two summands, not to ss + uu: the smaller gradient alone may be short, and is no rounding.
    length = mixed_norm(alpha_s, alpha_u, products)
    cancelled = (length**2 <= _EQUAL * (alpha_s**2 * ss + alpha_u**2 * uu)) & ~fallback
    scale = torch.where(fallback, 1.0, magnitude(alpha_s, alpha_u, products)) if meo else torch.ones_like(ss)
    capped = cancelled
    if meo and max_scale is not None:
        capped = capped | (scale > max_scale)
        scale = scale.clamp(max=max_scale)
    return Mix(alpha_s, alpha_u, torch.where(cancelled, 0.0, scale), fallback, capped)


def _scalars(*values: Tensor | float) -> Iterator[Tensor]:
    return (torch.as_tensor(v, dtype=_wide(v.device if isinstance(v, Tensor) else None)) for v in values)


def _wide(device: torch.device | None) -> torch.dtype:
    return torch.float32 if device is not None and device.type == "mps" else torch.float64
