"""What each class has seen last, first in, first out, on the device: memories of vectors, or of whole crops.

A memory is large and a step writes few of its rows: it notes what they held, so that the step can be taken back without
a copy of the whole (`begin`, `restore`).

Axes: G slots of a step, K classes, m vectors that a slot may bring to a class, D channels, T rows of all rings,
N rows that are written, X whatever a row holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Rings(nn.Module):
    """A ring buffer of each class, all in one block of memory: buffers of the method, so checkpoints carry them.

    Args:
        name: of the buffer that holds the rows.
        sizes: rows that each class keeps.
        shape: X.
        dtype: of a row.
    """

    inserted_K: Tensor
    _sizes_K: Tensor
    _starts_K: Tensor

    def __init__(self, name: str, sizes: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self._name = name
        self._journal: list[tuple[Tensor, Tensor]] | None = None
        sizes_K = torch.tensor(sizes)
        self.register_buffer("_sizes_K", sizes_K, persistent=False)
        self.register_buffer("_starts_K", sizes_K.cumsum(0) - sizes_K, persistent=False)
        # the last row takes what is not to be kept: a fixed number of rows is written, whatever there is to insert
        self.register_buffer(name, torch.zeros(sum(sizes) + 1, *shape, dtype=dtype))
        self.register_buffer("inserted_K", torch.zeros(len(sizes), dtype=torch.int64))

    @property
    def rows_TX(self) -> Tensor:
        """Everything that is held, and a last row that is not."""
        return self.get_buffer(self._name)

    @property
    def filled_K(self) -> Tensor:
        """Rows that each class holds now, int64."""
        return torch.minimum(self.inserted_K, self._sizes_K)

    def begin(self) -> None:
        """From now on notes what is overwritten, until `restore`."""
        self._journal = []

    @torch.no_grad()
    def restore(self, finite: Tensor) -> None:
        """Gives the rows written since `begin` back what they held, unless the step counts; counters are not touched.

        Args:
            finite: bool scalar on the device.
        """
        for row_N, before_NX in reversed(self._journal or []):
            self.rows_TX[row_N] = torch.where(finite, self.rows_TX[row_N], before_NX)
        self._journal = None

    def _take(self, counts_GK: Tensor, most: int) -> Tensor:
        """Rows for the first `counts_GK` of `most` entries of each slot and class: int64 [G, K, most].

        Of more than fit, the last ones: no row is given twice, so that the order of writing does not matter. Entries
        that are not kept get the last row of all.
        """
        place_m = torch.arange(most, device=counts_GK.device)
        total_K = counts_GK.sum(dim=0)
        order_GKm = (counts_GK.cumsum(dim=0) - counts_GK)[:, :, None] + place_m
        lasting_GKm = (place_m < counts_GK[:, :, None]) & (order_GKm >= (total_K - self._sizes_K)[:, None])
        row_GKm = self._starts_K[:, None] + (self.inserted_K[:, None] + order_GKm) % self._sizes_K[:, None]
        self.inserted_K += total_K
        return torch.where(lasting_GKm, row_GKm, len(self.rows_TX) - 1)

    def _write(self, row_N: Tensor, values_NX: Tensor) -> None:
        if self._journal is not None:
            self._journal.append((row_N, self.rows_TX[row_N]))
        self.rows_TX[row_N] = values_NX


class ClassQueues(Rings):
    """The newest vectors of each class, in fp16: the memory of contrastive methods.

    Args:
        sizes: vectors that each class keeps.
        dim: D.
    """

    keys_TD: Tensor

    def __init__(self, sizes: Sequence[int], dim: int) -> None:
        super().__init__("keys_TD", sizes, (dim,), torch.float16)

    @torch.no_grad()
    def insert(self, keys_GKmD: Tensor, counts_GK: Tensor) -> None:
        """Adds vectors in the order of their slots; the oldest make room.

        Args:
            keys_GKmD: float16, the same on all ranks.
            counts_GK: int64, how many of the m count, the first ones.
        """
        row_GKm = self._take(counts_GK, keys_GKmD.shape[2])
        kept_GKm1 = (row_GKm < len(self.keys_TD) - 1)[..., None]
        self._write(row_GKm, torch.where(kept_GKm1, keys_GKmD, 0.0))

    def draw(self, uniform_KA: Tensor) -> Tensor:
        """Vectors drawn with replacement from each class's queue.

        Args:
            uniform_KA: [..., K, A] numbers in [0, 1), one for each draw.

        Returns:
            float32 [..., K, A, D]; zeros, or another class's, where a queue is empty.
        """
        row_KA = self._starts_K[:, None] + (uniform_KA * self.filled_K[:, None]).long()
        return self.keys_TD[row_KA].float()
