"""Random numbers that are a pure function of (seed, step, global slot, name): the same on any device, rank or restart.

A counter-based generator: the splitmix64 finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", 2014) over a key that folds in seed, step, name, slot and position. Signed 64-bit arithmetic wraps
around in torch, so CPU and GPU give the same bits, and nothing is read back from the device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts arithmetically; the generator needs a logical shift


def _splitmix(x: Tensor) -> Tensor:
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def uniform(seed: int, step: int, slots_B: Tensor, name: str, count: int) -> Tensor:
    """Uniform numbers in [0, 1), one row a global slot.

    Args:
        seed: seed of the run.
        step: global step, from 0.
        slots_B: int64 [B], global slot of each image; decides the device.
        name: what the draw is for; two names give independent numbers.
        count: numbers a slot.

    Returns:
        float32 [B, count], multiples of 2**-24.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    key = _signed(int.from_bytes(digest, "little"))
    rows = _splitmix(slots_B.long() + key)
    columns = torch.arange(count, device=slots_B.device, dtype=torch.int64)
    bits = _splitmix(rows[:, None] ^ _splitmix(columns)[None, :])
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def beta(uniform_BN: Tensor, alpha: int) -> Tensor:
    """Numbers from Beta(alpha, N + 1 - alpha): the alpha-th smallest of N uniform ones, which has exactly that law.

    Args:
        uniform_BN: of `uniform`; N = alpha + beta - 1.
        alpha: 1..N.

    Returns:
        float32 [B] in [0, 1), on the device of the uniform numbers.
    """
    return uniform_BN.sort(dim=1).values[:, alpha - 1]


def choice(uniform_BN: Tensor, weight_K: Tensor) -> Tensor:
    """Classes drawn with replacement, each as often as its share of the weights says; never one of weight 0.

    Args:
        uniform_BN: of `uniform`.
        weight_K: 0 or more, not all 0.

    Returns:
        int64 of the same shape, on the device of the uniform numbers.
    """
    reached_K = weight_K.cumsum(dim=0)
    # a number below 1, times the sum, may round to the sum: then it is the last class that has a weight
    place_BN = torch.searchsorted(reached_K, uniform_BN * reached_K[-1], right=True)
    last = torch.searchsorted(reached_K, reached_K[-1:], right=False)
    return torch.minimum(place_BN, last)
