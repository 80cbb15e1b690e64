"""Weak crops of recent steps, from which images are mixed that the stream does not bring at the moment.

A stream cannot be asked for "an image with a bicycle". The cache can: each group of slots leaves one crop a step, filed
under the weakest class that the teacher sees in it, so that crops of rare classes stay for long and those of common
ones, of which there are always new ones, make room. It is the same on all ranks. A step exchanges 4 S^2 + K bytes a
group of slots (0.4 MB for crops of S = 321, 1.1 of 513, 2.4 of 769) and 8 (K + 1) bytes an image.

Axes: G groups of slots, U unlabeled images of this rank, K classes, T crops, S x S pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raysemi.methods.base import AcrossRanks
from raysemi.methods.queues import Rings
from raysemi.ops.contrast import draw_members


class CropCache(Rings):
    """The newest crops of each class, and which classes the teacher last saw in each.

    Args:
        num_classes: K.
        per_class: crops that each class keeps: 4 K S^2 bytes for each of them.
        side: S, pixels.
    """

    crops_T4SS: Tensor
    """uint8: RGB, and 1 where a pixel is not padding."""
    presence_TK: Tensor

    def __init__(self, num_classes: int, per_class: int, side: int) -> None:
        super().__init__("crops_T4SS", [per_class] * num_classes, (4, side, side), torch.uint8)
        self.per_class = per_class
        self.register_buffer("presence_TK", torch.zeros(len(self.rows_TX), num_classes, dtype=torch.bool))

    @torch.no_grad()
    def draw(self, class_U: Tensor | None, uniform_U: Tensor) -> Tensor:
        """Rows of crops with given classes, of any where there is none with that class.

        Args:
            class_U: int64; None: any crop.
            uniform_U: numbers in [0, 1).

        Returns:
            int64 [U]; the last row, which holds no crop, while the cache is empty.
        """
        held_KC = torch.arange(self.per_class, device=uniform_U.device) < self.filled_K[:, None]
        held_T = torch.cat((held_KC.flatten(), held_KC.new_zeros(1)))
        eligible_UT = held_T.expand(len(uniform_U), -1)
        if class_U is not None:
            showing_UT = self.presence_TK.T[class_U] & held_T
            eligible_UT = torch.where(showing_UT.any(dim=1, keepdim=True), showing_UT, eligible_UT)
        return draw_members(eligible_UT[:, None], uniform_U[:, None, None]).flatten()

    def read(self, row_U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(float32 [U, 3, S, S] RGB in [0, 1], bool [U, S, S] valid, bool [U] whether there is a crop at all)."""
        crop_U4SS = self.crops_T4SS[row_U]
        return crop_U4SS[:, :3].float().div_(255.0), crop_U4SS[:, 3] > 0, row_U < len(self.crops_T4SS) - 1

    @torch.no_grad()
    def renew(self, row_U: Tensor, presence_UK: Tensor, across: AcrossRanks) -> None:
        """What the teacher now sees in crops that were read; of a crop that was read more than once all of it."""
        seen_UX = torch.cat((row_U[:, None], presence_UK.long()), dim=1)
        row_G, *_ = (seen_GX := across.gather(seen_UX).flatten(0, 1)).unbind(dim=1)
        read_T = torch.zeros_like(self.presence_TK[:, 0], dtype=torch.int64).index_add_(
            0, row_G, torch.ones_like(row_G)
        )
        seen_TK = torch.zeros_like(self.presence_TK, dtype=torch.int64).index_add_(0, row_G, seen_GX[:, 1:])
        read_T[-1] = 0  # no crop
        self.presence_TK.copy_(torch.where(read_T[:, None] > 0, seen_TK > 0, self.presence_TK))

    @torch.no_grad()
    def insert(
        self, images_G3SS: Tensor, valid_GSS: Tensor, presence_GK: Tensor, bank_K: Tensor, across: AcrossRanks
    ) -> None:
        """Files the crops of all ranks, each under the weakest class that it shows; one that shows none is not kept.

        Args:
            images_G3SS: RGB in [0, 1].
            valid_GSS: bool, False at padding.
            presence_GK: bool, classes that the teacher sees.
            bank_K: confidences of the classes, the same on all ranks.
            across: the ranks.
        """
        crop_G4SS = torch.cat(((images_G3SS * 255.0).round().byte(), valid_GSS[:, None].byte()), dim=1)
        packed_GX = torch.cat((crop_G4SS.flatten(1), presence_GK.byte()), dim=1)
        packed_GX = across.gather(packed_GX).flatten(0, 1)
        num_classes = len(bank_K)
        presence_GK = packed_GX[:, -num_classes:] > 0
        home_G1 = torch.where(presence_GK, bank_K, torch.inf).argmin(dim=1, keepdim=True)
        counts_GK = torch.zeros_like(presence_GK).scatter_(1, home_G1, True) & presence_GK
        row_G = self._take(counts_GK.long(), 1).squeeze(2).gather(1, home_G1).squeeze(1)
        kept_G1 = (row_G < len(self.crops_T4SS) - 1)[:, None]
        crops_GX = torch.where(kept_G1, packed_GX[:, :-num_classes], 0)
        self._write(row_G, crops_GX.view(-1, *self.crops_T4SS.shape[1:]))
        self.presence_TK[row_G] = presence_GK & kept_G1
