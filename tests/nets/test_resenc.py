"""The residual encoder U-Net: tensors and forward of the stock network, skips or none, anisotropic strides, impossible arguments."""

import sys

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn

from volssl.files import BadInput
from volssl.nets.blocks import InstanceNorm3d
from volssl.nets.resenc import ResEncUNet
from volssl.processes import BatchNorm3d

SMALL = {"features": (4, 8, 12), "blocks": (1, 2, 1)}
THIN = {"strides": (1, (1, 2, 2), 2), "kernels": ((1, 3, 3), 3, 3)}  # slices thicker than pixels, as nnU-Net plans it


def stock(in_channels=1, *, features, blocks, strides, kernels):
    """As nnU-Net's planner writes it."""
    return ResidualEncoderUNet(
        in_channels,
        len(features),
        features,
        nn.Conv3d,
        kernels,
        strides,
        blocks,
        3,
        [1] * (len(features) - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def without_segmentation(state):
    """The stock decoder also holds the whole encoder, and the layers that give classes."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(("encoder.", "seg_layers."))}


def randomise(net):
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize(
    "arguments, plan",
    [
        (SMALL, SMALL | {"strides": [1, 2, 2], "kernels": 3}),
        (SMALL | THIN, SMALL | {"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]], "kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]}),
    ],
)
def test_tensors_and_forward_are_the_stock_networks(arguments, plan):
    torch.manual_seed(0)
    reference, net = stock(2, **plan), ResEncUNet(2, **arguments, skips=True)
    assert shapes(net.encoder.state_dict()) == shapes(reference.encoder.state_dict())
    assert shapes(net.decoder.state_dict()) == shapes(without_segmentation(reference.decoder.state_dict()))
    randomise(net)
    reference.encoder.load_state_dict(net.encoder.state_dict())
    reference.decoder.load_state_dict(net.decoder.state_dict(), strict=False)
    x = torch.randn(2, 2, 4, 8, 16)
    finest_first = net(x)[::-1]
    for logits, layer, decoded in zip(reference(x), reference.decoder.seg_layers[::-1], finest_first, strict=True):
        torch.testing.assert_close(layer(decoded), logits)
    for one, other in zip(net.encoder(x), reference.encoder(x), strict=True):
        torch.testing.assert_close(one, other)


def test_the_defaults_are_nnunets_usual_3d_network():
    with torch.device("meta"):
        net = ResEncUNet(skips=True)
        plan = {"features": (32, 64, 128, 256, 320, 320), "blocks": (1, 3, 4, 6, 6, 6), "strides": [1, 2, 2, 2, 2, 2], "kernels": 3}
        reference = stock(**plan)
    assert shapes(net.encoder.state_dict()) == shapes(reference.encoder.state_dict())
    assert shapes(net.decoder.state_dict()) == shapes(without_segmentation(reference.decoder.state_dict()))


def test_seven_stages_repeat_the_last_number_of_blocks():
    assert ResEncUNet(features=(2,) * 7).arguments["blocks"] == (1, 3, 4, 6, 6, 6, 6)


@pytest.mark.parametrize("skips", [False, True])
def test_maps_have_the_sizes_and_channels_told(skips):
    net = ResEncUNet(**SMALL, **THIN, skips=skips)
    x = torch.randn(1, 1, 4, 8, 8)
    features, decoded = net.encoder(x), net(x)
    assert [f.shape[1] for f in features] == list(net.encoder.channels) == [4, 8, 12]
    assert [tuple(a // b for a, b in zip((4, 8, 8), f.shape[2:], strict=True)) for f in features] == list(net.encoder.strides)
    assert [d.shape[1] for d in decoded] == list(net.decoder.channels) == [8, 4]
    assert decoded[-1].shape[2:] == x.shape[2:] and net.stride == (2, 4, 4)
    again = ResEncUNet(**net.arguments, skips=skips)
    assert shapes(again.state_dict()) == shapes(net.state_dict())


def test_without_skips_nothing_passes_beside_the_coarsest_map():
    torch.manual_seed(0)
    net = ResEncUNet(**SMALL)
    features = net.encoder(torch.randn(1, 1, 8, 8, 8))
    wanted = net.decoder(features)
    changed = net.decoder([torch.randn_like(f) for f in features[:-1]] + features[-1:])
    assert all(torch.equal(one, other) for one, other in zip(wanted, changed, strict=True))


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
@pytest.mark.parametrize("skips", [False, True])
def test_every_parameter_gets_a_gradient(norm, skips):
    torch.manual_seed(0)
    net = ResEncUNet(2, **SMALL, norm=norm, skips=skips)
    randomise(net)
    net(torch.randn(2, 2, 8, 8, 16))[-1].square().mean().backward()
    names = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # A bias in front of a normalisation by channel is taken away again.
    assert not {name for name in names if not name.endswith("conv.bias")}
    kinds = {type(layer) for layer in net.modules()}
    assert {"batch": BatchNorm3d, "instance": InstanceNorm3d, "group": nn.GroupNorm}[norm] in kinds
    assert len(kinds & {BatchNorm3d, nn.BatchNorm3d, nn.InstanceNorm3d, InstanceNorm3d, nn.GroupNorm}) == 1


def test_residual_branches_start_at_zero_as_in_nnunet():
    net = ResEncUNet(**SMALL)
    assert all(not p.any() for name, p in net.named_parameters() if ".conv2.norm." in name)
    assert all(p.any() for name, p in net.named_parameters() if name.endswith("conv.weight"))


def test_all_faults_come_at_once():
    with pytest.raises(BadInput) as caught:
        ResEncUNet(0, features=(4, 0), blocks=(1, 0, 1), strides=(2, 0), kernels=(2, 3))
    for part in (
        "in_channels",
        "features must be",
        "blocks must have one entry",
        "blocks must be",
        "strides must be",
        "kernels must have odd",
    ):
        assert part in str(caught.value)
    with pytest.raises(BadInput, match="features must be 2 or more"):
        ResEncUNet(features=())


class Absent:
    """Stands before the finders of modules and knows of no such package."""

    def find_spec(self, name, path=None, target=None):
        if name == "dynamic_network_architectures":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_missing_package_is_said(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("dynamic_network_architectures")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(BadInput, match=r"pip install \"volssl\[resenc\]\""):
        ResEncUNet(**SMALL)
