import pytest
import torch

from volssl.files import BadInput
from volssl.nets.folded import FoldedUNet, fold, unfold


def test_fold_and_unfold_undo_each_other():
    x = torch.randn(2, 3, 4, 6, 8)
    assert fold(x).shape == (2, 24, 2, 3, 4)
    assert torch.equal(unfold(fold(x)), x)


def test_where_a_voxel_goes():
    x = torch.zeros(1, 2, 4, 4, 4)
    x[0, 1, 3, 0, 2] = 1  # channel 1, block (1, 0, 1), sub-voxel (1, 0, 0)
    assert fold(x).nonzero().tolist() == [[0, 8 + 4, 1, 0, 1]]


@pytest.mark.parametrize("skips", [False, True])
def test_maps_have_the_sizes_and_channels_told(skips):
    net = FoldedUNet(2, width=2, depth=3, skips=skips)
    x = torch.randn(1, 2, 16, 8, 8)
    features = net.encoder(x)
    assert [f.shape[1] for f in features] == list(net.encoder.channels)
    assert [tuple(a // b for a, b in zip((16, 8, 8), f.shape[2:], strict=True)) for f in features] == list(net.encoder.strides)
    decoded = net(x)
    assert [d.shape[1] for d in decoded] == list(net.decoder.channels)
    assert decoded[-1].shape[2:] == x.shape[2:]
    assert net.stride == (8, 8, 8)


def test_every_parameter_and_voxel_is_reached():
    torch.manual_seed(0)
    net = FoldedUNet(1, width=2, depth=2, skips=True)
    x = torch.randn(1, 1, 8, 8, 8, requires_grad=True)
    net(x)[-1].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in net.named_parameters() if "norm" in name or "weight" in name)
    assert x.grad is not None
    assert (x.grad != 0).all()


def test_refusal():
    with pytest.raises(BadInput, match="depth >= 2"):
        FoldedUNet(depth=1)
