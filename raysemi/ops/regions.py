"""Region propagation: segments that are mostly trusted and mostly one class take that class as a whole, in order.

Segment s of an image, R_s, looks at its trusted pixels Q_s (those trusted before the first segment). It is accepted
when |Q_s| / |R_s| >= threshold and more than threshold * |Q_s| of them have one class *at that moment*; then all of R_s
takes that class and becomes trusted. So the order of segments matters, and a later segment sees relabelled pixels.
Every implementation gives the same bits; ratios are compared in fp32 (counts are exact there, quotients rounded once).

Source: Sun et al. 2024, CorrMatch; exact sequential semantics, ties (threshold below 0.5) to the smallest class.
Axes: B images, S segments, H x W pixels, P = H * W.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysemi.errors import ConfigError

Impl = Literal["auto", "oracle", "loop", "bitplane"]

_CLASSES = 256
"""Labels are bytes: loop counts into this many cells, whatever K is."""

_Words = npt.NDArray[np.uint64]
_Bits = npt.NDArray[np.bool_]
_Labels = npt.NDArray[np.uint8]


@torch.no_grad()
def propagate_regions(
    labels_BHW: Tensor, trusted_BHW: Tensor, shapes_BSHW: Tensor, threshold: Tensor | float, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Lets each segment, in order, spread its majority class over all of its pixels.

    Args:
        labels_BHW: integer class of each pixel, 0..255.
        trusted_BHW: bool, pixels whose label may be counted.
        shapes_BSHW: bool, S segments an image, without the CutMix box and padding; empty ones and duplicates are legal.
        threshold: in (0, 1), a number or a scalar tensor; `loop` never reads it back to the host.
        impl: oracle: the literal loop, on the CPU. loop: S steps on the device over all images at once, without a host
            wait. bitplane: on the CPU, 64 pixels a word, threshold of at least 0.5. auto: for tensors on the CPU
            bitplane where the threshold allows it, else oracle (there ten times as fast as loop); elsewhere loop.

    Returns:
        (labels_BHW, trusted_BHW) in the dtypes and on the device of the inputs, which stay as they are.

    Raises:
        ConfigError: bitplane with a threshold below 0.5, or an unknown impl.
    """
    if impl == "auto":
        impl = _fastest_on_cpu(threshold) if labels_BHW.device.type == "cpu" else "loop"
    if impl == "loop":
        return _loop(labels_BHW, trusted_BHW, shapes_BSHW, threshold)
    if impl not in ("oracle", "bitplane"):
        raise ConfigError(f"impl must be auto, oracle, loop or bitplane; got {impl!r}. Use auto.")
    limit = _on_host(threshold)
    if impl == "bitplane" and limit < 0.5:
        raise ConfigError(
            f"threshold must be at least 0.5 for impl bitplane, which finds majorities; got {limit}. Use impl loop."
        )
    of_image = _oracle if impl == "oracle" else _bitplane
    labels, trusted = labels_BHW.to("cpu", torch.uint8).numpy(), trusted_BHW.cpu().numpy()
    shapes = shapes_BSHW.cpu().numpy()
    size = labels[0].size if len(labels) else 0
    images = [
        of_image(y.reshape(size), f.reshape(size), r.reshape(len(r), size), limit)
        for y, f, r in zip(labels, trusted, shapes, strict=True)
    ]
    if not images:
        return labels_BHW.clone(), trusted_BHW.clone()
    new_labels, new_trusted = (
        torch.from_numpy(np.stack(part)).view(labels_BHW.shape) for part in zip(*images, strict=True)
    )
    return new_labels.to(labels_BHW), new_trusted.to(trusted_BHW)


def _fastest_on_cpu(threshold: Tensor | float) -> Impl:
    return "bitplane" if _on_host(threshold) >= 0.5 else "oracle"


def _on_host(threshold: Tensor | float) -> np.float32:
    return np.float32(threshold.item() if isinstance(threshold, Tensor) else threshold)


def _oracle(labels_P: _Labels, trusted_P: _Bits, shapes_SP: _Bits, limit: np.float32) -> tuple[_Labels, _Bits]:
    labels_P, expanded_P = labels_P.copy(), trusted_P.copy()
    for shape_P in shapes_SP:
        counted_P = shape_P & trusted_P
        num_counted = np.float32(np.count_nonzero(counted_P))
        if num_counted == 0 or num_counted / np.float32(np.count_nonzero(shape_P)) < limit:
            continue
        counts_K = np.bincount(labels_P[counted_P])
        winner = counts_K.argmax()
        if np.float32(counts_K[winner]) / num_counted > limit:
            labels_P[shape_P] = winner
            expanded_P |= shape_P
    return labels_P, expanded_P


def _loop(
    labels_BHW: Tensor, trusted_BHW: Tensor, shapes_BSHW: Tensor, threshold: Tensor | float
) -> tuple[Tensor, Tensor]:
    device = labels_BHW.device
    if isinstance(threshold, Tensor):
        limit = threshold.to(device, torch.float32)
    else:
        limit = torch.full((), threshold, dtype=torch.float32, device=device)
    images, num_segments, height, width = shapes_BSHW.shape
    counted_BSHW = shapes_BSHW & trusted_BHW[:, None]
    num_counted_BS = counted_BSHW.sum(dim=(2, 3), dtype=torch.int32)
    num_shape_BS = shapes_BSHW.sum(dim=(2, 3), dtype=torch.int32)
    gate_BS = (num_counted_BS > 0) & (num_counted_BS.float() / num_shape_BS.clamp(min=1).float() >= limit)
    divisor_BS = num_counted_BS.clamp(min=1).float()

    current_BHW = labels_BHW.to(torch.int64, copy=True)  # scatter wants int64 cells: bytes would be widened each step
    expanded_BHW = trusted_BHW.clone()
    # cells by image and row, not by image: few pixels then add to the same address. Cell 256: not counted
    cells_BHC = torch.empty(images, height, _CLASSES + 1, dtype=torch.int32, device=device)
    ones_BHW = torch.ones(images, height, width, dtype=torch.int32, device=device)
    tie_C = torch.arange(_CLASSES - 1, -1, -1, device=device)
    for s in range(num_segments):
        cell_BHW = torch.where(counted_BSHW[:, s], current_BHW, _CLASSES)
        counts_BC = cells_BHC.zero_().scatter_add_(2, cell_BHW, ones_BHW).sum(dim=1)[:, :_CLASSES]
        # count and class in one number: the largest is the top count, and among equals the smallest class
        best_B = (counts_BC * _CLASSES + tie_C).amax(dim=1)
        winner_B = _CLASSES - 1 - best_B % _CLASSES
        share_B = (best_B // _CLASSES).float() / divisor_BS[:, s]
        accepted_B = gate_BS[:, s] & (share_B > limit)
        change_BHW = shapes_BSHW[:, s] & accepted_B[:, None, None]
        current_BHW = torch.where(change_BHW, winner_B[:, None, None], current_BHW)
        expanded_BHW |= change_BHW
    return current_BHW.to(labels_BHW.dtype), expanded_BHW


def _bitplane(labels_P: _Labels, trusted_P: _Bits, shapes_SP: _Bits, limit: np.float32) -> tuple[_Labels, _Bits]:
    num_planes = max(int(labels_P.max(initial=0)).bit_length(), 1)
    bits_N = np.arange(num_planes, dtype=np.uint8)
    planes_NW = _pack((labels_P >> bits_N[:, None]) & np.uint8(1))
    trusted_W, shapes_SW = _pack(trusted_P[None])[0], _pack(shapes_SP)
    counted_SW = shapes_SW & trusted_W
    num_counted_S, num_shape_S = _popcount(counted_SW), _popcount(shapes_SW)
    gate_S = num_counted_S.astype(np.float32) / np.maximum(num_shape_S, 1).astype(np.float32) >= limit
    for s in np.flatnonzero(gate_S & (num_counted_S > 0)):
        shape_W, counted_W, num_counted = shapes_SW[s], counted_SW[s], num_counted_S[s]
        set_NW = planes_NW & counted_W
        num_set_N = _popcount(set_NW)
        # a class with more than half of the pixels has, in each plane, the bit that more than half of them have
        winner_N = 2 * num_set_N > num_counted
        agree = np.where(winner_N, num_set_N, num_counted - num_set_N).min()
        if not np.float32(agree) / np.float32(num_counted) > limit:  # no class has more than its rarest bit
            continue
        if agree < num_counted:
            wrong_W = np.zeros_like(counted_W)  # counted pixels of which some bit is not the candidate's
            for set_W, wins in zip(set_NW, winner_N, strict=True):
                wrong_W |= set_W ^ counted_W if wins else set_W
            num_winner = num_counted - _popcount(wrong_W[None])[0]
            if not np.float32(num_winner) / np.float32(num_counted) > limit:
                continue
        elif num_counted == num_shape_S[s]:
            continue  # all of it is trusted and of this class already
        keep_W = ~shape_W
        for plane_W, wins in zip(planes_NW, winner_N, strict=True):
            if wins:
                plane_W |= shape_W
            else:
                plane_W &= keep_W
        trusted_W |= shape_W
    planes_NP = _unpack(planes_NW, labels_P.size)
    return np.bitwise_or.reduce(planes_NP << bits_N[:, None]), _unpack(trusted_W[None], labels_P.size)[0].view(np.bool_)


def _pack(bits_NP: npt.NDArray[np.bool_] | _Labels) -> _Words:
    """64 pixels a word, the rest of the last word 0."""
    rows, pixels = bits_NP.shape
    bytes_ND = np.zeros((rows, -(-pixels // 64) * 8), dtype=np.uint8)
    bytes_ND[:, : -(-pixels // 8)] = np.packbits(bits_NP, axis=1)
    return bytes_ND.view(np.uint64)


def _unpack(words_NW: _Words, pixels: int) -> _Labels:
    return np.unpackbits(words_NW.view(np.uint8), axis=1, count=pixels)


def _popcount(words_NW: _Words) -> npt.NDArray[np.int64]:
    return np.bitwise_count(words_NW).sum(axis=1, dtype=np.int64)
