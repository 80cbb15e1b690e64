"""The newest vectors of each class, first in, first out, on the device: the memory of contrastive methods.

Axes: G slots of a step, K classes, m vectors that a slot may bring to a class, D channels, T rows of all queues.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ClassQueues(nn.Module):
    """Ring buffers of fp16 vectors in one block of memory: buffers of the method, so checkpoints carry them.

    Args:
        sizes: vectors that each class keeps.
        dim: D.
    """

    keys_TD: Tensor
    inserted_K: Tensor
    _sizes_K: Tensor
    _starts_K: Tensor

    def __init__(self, sizes: Sequence[int], dim: int) -> None:
        super().__init__()
        sizes_K = torch.tensor(sizes)
        self.register_buffer("_sizes_K", sizes_K, persistent=False)
        self.register_buffer("_starts_K", sizes_K.cumsum(0) - sizes_K, persistent=False)
        # the last row takes what is not to be kept: a fixed number of rows is written, whatever there is to insert
        self.register_buffer("keys_TD", torch.zeros(sum(sizes) + 1, dim, dtype=torch.float16))
        self.register_buffer("inserted_K", torch.zeros(len(sizes), dtype=torch.int64))

    @property
    def filled_K(self) -> Tensor:
        """Vectors that each class holds now, int64."""
        return torch.minimum(self.inserted_K, self._sizes_K)

    @torch.no_grad()
    def insert(self, keys_GKmD: Tensor, counts_GK: Tensor) -> None:
        """Adds vectors in the order of their slots; the oldest make room.

        Args:
            keys_GKmD: float16, the same on all ranks.
            counts_GK: int64, how many of the m count, the first ones.
        """
        most, num_trash = keys_GKmD.shape[2], len(self.keys_TD) - 1
        place_m = torch.arange(most, device=counts_GK.device)
        total_K = counts_GK.sum(dim=0)
        order_GKm = (counts_GK.cumsum(dim=0) - counts_GK)[:, :, None] + place_m
        # of more than fit, the last ones: no row is written twice, so that the order of writing does not matter
        lasting_GKm = (place_m < counts_GK[:, :, None]) & (order_GKm >= (total_K - self._sizes_K)[:, None])
        row_GKm = self._starts_K[:, None] + (self.inserted_K[:, None] + order_GKm) % self._sizes_K[:, None]
        self.keys_TD[torch.where(lasting_GKm, row_GKm, num_trash)] = torch.where(lasting_GKm[..., None], keys_GKmD, 0.0)
        self.inserted_K += total_K

    def draw(self, uniform_KA: Tensor) -> Tensor:
        """Vectors drawn with replacement from each class's queue.

        Args:
            uniform_KA: [..., K, A] numbers in [0, 1), one for each draw.

        Returns:
            float32 [..., K, A, D]; zeros, or another class's, where a queue is empty.
        """
        row_KA = self._starts_K[:, None] + (uniform_KA * self.filled_K[:, None]).long()
        return self.keys_TD[row_KA].float()
