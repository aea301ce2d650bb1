"""Swin UNETR: tensors and forward of MONAI's, fewer stages, skips or none, impossible arguments."""

import re

import pytest
import torch
from monai.networks.nets.swin_unetr import SwinUNETR as Stock
from torch import nn

from volssl.files import BadInput
from volssl.nets.blocks import InstanceNorm3d
from volssl.nets.swinunetr import SwinUNETR
from volssl.processes import BatchNorm3d

SMALL = {"width": 4, "depths": (1, 2), "heads": (1, 2), "window": 3}


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(0)
    return Stock(in_channels=2, out_channels=3, feature_size=12).eval()


def given(net, stock):
    """Lay the stock network's weights into ours, each under its own name."""
    state = stock.state_dict()
    net.encoder.load_state_dict({name.removeprefix("swinViT."): t for name, t in state.items() if name.startswith("swinViT.")})
    net.decoder.load_state_dict({name: t for name, t in state.items() if not name.startswith(("swinViT.", "out."))})
    return net.eval()


@torch.no_grad()
def test_forward_is_monais(stock):
    net = given(SwinUNETR(2, width=12, skips=True), stock)
    x = torch.randn(1, 2, 64, 32, 32)
    torch.testing.assert_close(stock.out(net(x)[-1]), stock(x))
    for one, other in zip(net.encoder(x), stock.swinViT(x), strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_the_layout_in_memory_changes_nothing(stock):
    net = given(SwinUNETR(2, width=12, skips=True), stock)
    x = torch.randn(1, 2, 32, 32, 32).contiguous(memory_format=torch.channels_last_3d)
    # One voxel is left at stride 32, so the coarsest block is left out; the window attention is what could go wrong.
    for one, other in zip(net.encoder(x), stock.swinViT(x.contiguous()), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("depths", [(1,), (1, 2), (1, 1, 1)])
def test_maps_have_the_sizes_and_channels_told(skips, depths):
    net = SwinUNETR(2, width=6, depths=depths, window=3, skips=skips)
    x = torch.randn(1, 2, 32, 16, 16) if len(depths) < 3 else torch.randn(1, 2, 32, 16, 32)
    features, decoded = net.encoder(x), net(x)
    assert [f.shape[1] for f in features] == list(net.encoder.channels)
    sides = x.shape[2:]
    assert [tuple(a // b for a, b in zip(sides, f.shape[2:], strict=True)) for f in features] == list(net.encoder.strides)
    assert net.stride == (2 ** (len(depths) + 1),) * 3 == net.encoder.strides[-1]
    assert [d.shape[1] for d in decoded] == list(net.decoder.channels)
    assert len(decoded) == len(depths) + 1 and decoded[-1].shape[2:] == sides
    again = SwinUNETR(**net.arguments, skips=skips)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in net.state_dict().items()}


def test_without_skips_nothing_passes_beside_the_coarsest_map():
    torch.manual_seed(0)
    net = SwinUNETR(**SMALL)
    x = torch.randn(1, 1, 16, 16, 16)
    features = net.encoder(x)
    changed = net.decoder([torch.randn_like(f) for f in features[:-1]] + features[-1:])
    assert all(torch.equal(one, other) for one, other in zip(net(x), changed, strict=True))


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
@pytest.mark.parametrize("skips", [False, True])
def test_every_parameter_gets_a_gradient(norm, skips):
    torch.manual_seed(0)
    net = SwinUNETR(2, **SMALL, norm=norm, skips=skips)
    net(torch.randn(2, 2, 16, 16, 16))[-1].square().mean().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    kinds = {type(layer) for layer in net.decoder.modules()}
    wanted = {"batch": BatchNorm3d, "instance": InstanceNorm3d, "group": nn.GroupNorm}[norm]
    assert kinds & {BatchNorm3d, nn.BatchNorm3d, nn.InstanceNorm3d, InstanceNorm3d, nn.GroupNorm} == {wanted}


def test_all_faults_come_at_once():
    with pytest.raises(BadInput) as caught:
        SwinUNETR(0, width=5, depths=(1, 1, 1, 1, 1), heads=(2,), window=0)
    for part in ("in_channels must", "window must", "depths must be one to 4", "heads must have one entry", "heads must divide .* 5 by 2"):
        assert re.search(part, str(caught.value))
    with pytest.raises(BadInput, match="depths must be one to 4 numbers"):
        SwinUNETR(depths=())


def test_sides_that_do_not_fit():
    net = SwinUNETR(**SMALL)
    with pytest.raises(BadInput, match="multiple of the net's stride 8"):
        net(torch.zeros(1, 1, 16, 16, 12))
    with pytest.raises(BadInput, match="multiple of the net's stride 8"):
        net.encoder(torch.zeros(1, 1, 16, 16, 12))
    with pytest.raises(BadInput, match="leaves one voxel"):
        net(torch.zeros(1, 1, 8, 8, 8))
    SwinUNETR(**SMALL, norm="group")(torch.zeros(1, 1, 8, 8, 8))
