"""Inputs that a backbone cannot take are refused in words, by every backbone."""

import pytest
import torch

from volssl.files import BadInput
from volssl.nets.folded import FoldedUNet
from volssl.nets.sides import side_fault, triple
from volssl.nets.unet import UNet


def test_what_fits():
    assert side_fault((16, 8, 8), (8, 8, 4), norm="instance") is None
    assert side_fault((8, 8, 8), (8, 8, 8), norm="group", batch=1) is None
    assert side_fault((8, 8, 8), (8, 8, 8), norm="batch", batch=2) is None
    assert triple(2) == (2, 2, 2) and triple([1, 2, 2]) == (1, 2, 2)


@pytest.mark.parametrize(
    "size, stride, norm, told",
    [
        ((16, 12, 8), (8, 8, 8), "group", "multiple of the net's stride 8; found"),
        ((16, 16, 6), (8, 8, 4), "group", r"stride \(8, 8, 4\); found \(16, 16, 6\)"),
        ((0, 8, 8), (8, 8, 8), "group", "multiple of"),
        ((8, 8, 4), (8, 8, 4), "instance", "leaves one voxel .* instance normalisation"),
        ((8, 8, 8), (8, 8, 8), "batch", "leaves one voxel at the net's stride 8, which batch"),
    ],
)
def test_what_does_not(size, stride, norm, told):
    with pytest.raises(BadInput, match=told):
        raise BadInput(side_fault(size, stride, norm=norm, batch=1))


@pytest.mark.parametrize("net", [UNet(width=2, depth=2, norm="instance"), FoldedUNet(width=2, depth=2)])
def test_encoder_and_net_refuse(net):
    side = net.stride[0]
    for run in (net, net.encoder):
        with pytest.raises(BadInput, match="multiple of the net's stride"):
            run(torch.zeros(1, 1, side * 2, side * 2, side * 2 + 1))
        with pytest.raises(BadInput, match="leaves one voxel"):
            run(torch.zeros(1, 1, side, side, side))
