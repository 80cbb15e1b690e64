"""DPT has the published sizes, and computes what the formula says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raysemi.models.dpt import DPT, WIDTHS


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("dim", "published"), [(384, 24_795_637 - 22_056_576), (768, 97_528_789 - 86_580_480)])
def test_the_decoder_has_the_published_parameters_but_for_the_unused_residual_unit(dim: int, published: int) -> None:
    with torch.device("meta"):
        decoder = DPT(dim, 21, *WIDTHS[dim])
    unused = count(decoder.fusions[0].lateral)
    assert decoder.fusions[3].lateral is None
    assert unused == {384: 73_856, 768: 295_168}[dim]
    assert count(decoder) + unused == published


def test_levels_and_outputs_have_the_published_sizes() -> None:
    with torch.device("meta"):
        decoder = DPT(384, 21, *WIDTHS[384])
        logits, penultimate, joined, _ = decoder([torch.zeros(2, 384, 37, 37)] * 4)
        levels = [decoder.scale[i](decoder.project[i](torch.zeros(2, 384, 37, 37))).shape for i in range(4)]
    assert [tuple(shape) for shape in levels] == [
        (2, 48, 148, 148),
        (2, 96, 74, 74),
        (2, 192, 37, 37),
        (2, 384, 19, 19),
    ]
    assert logits.shape == (2, 21, 296, 296)
    assert penultimate.shape == joined.shape == (2, 64, 296, 296)


def residual(x: Tensor, unit: nn.Module) -> Tensor:
    inner = functional.conv2d(functional.relu(x), unit.first.weight, unit.first.bias, padding=1)
    return functional.conv2d(functional.relu(inner), unit.second.weight, unit.second.bias, padding=1) + x


def conv(x: Tensor, layer: nn.Module, **rest: int) -> Tensor:
    return functional.conv2d(x, layer.weight, layer.bias, **rest)


def up(x: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(x, size, mode="bilinear", align_corners=True)


def test_it_computes_the_formula() -> None:
    decoder = DPT(6, 3, 4, (2, 3, 5, 7)).double()
    m1, m2, m3, m4 = (torch.randn(2, 6, 3, 5, dtype=torch.float64) for _ in range(4))
    p1, p2, p3, p4 = decoder.project
    s1, s2, _, s4 = decoder.scale
    l1, l2, l3, l4 = decoder.lateral
    f1, f2, f3, f4 = decoder.fusions
    first = conv(functional.conv_transpose2d(conv(m1, p1), s1.weight, s1.bias, stride=4), l1, padding=1)
    second = conv(functional.conv_transpose2d(conv(m2, p2), s2.weight, s2.bias, stride=2), l2, padding=1)
    third = conv(conv(m3, p3), l3, padding=1)
    fourth = conv(conv(conv(m4, p4), s4, stride=2, padding=1), l4, padding=1)
    assert fourth.shape[-2:] == (2, 3)
    path = conv(up(residual(fourth, f4.fused), (3, 5)), f4.project)
    path = conv(up(residual(path + residual(third, f3.lateral), f3.fused), (6, 10)), f3.project)
    path = conv(up(residual(path + residual(second, f2.lateral), f2.fused), (12, 20)), f2.project)
    path = conv(up(residual(path + residual(first, f1.lateral), f1.fused), (24, 40)), f1.project)
    hidden = functional.relu(conv(path, decoder.output[0], padding=1))
    logits, penultimate, joined, pyramid = decoder((m1, m2, m3, m4))
    torch.testing.assert_close(joined, path)
    assert pyramid is None
    torch.testing.assert_close(penultimate, hidden)
    torch.testing.assert_close(logits, conv(hidden, decoder.classifier))
