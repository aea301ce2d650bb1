"""Layers of other packages are exchanged without a change of names, values or sharing."""

import pytest
import torch
from torch import nn

from volssl.nets.adapt import Conv3d, adapt
from volssl.nets.blocks import InstanceNorm3d
from volssl.nets.heads import MidRestorationHead
from volssl.processes import BatchNorm3d


class Twice(nn.Module):
    """One convolution that stands in two places, as in nnU-Net's blocks."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, stride=(1, 2, 1), padding=(1, 1, 1))
        self.empty = None
        self.all = nn.Sequential(self.conv, nn.InstanceNorm3d(4), nn.ReLU())

    def forward(self, x):
        return self.all(x)


def test_names_values_and_sharing_stay():
    torch.manual_seed(0)
    plain = Twice()
    x = torch.randn(2, 2, 2, 4, 5)
    wanted, before = plain(x), {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    made = adapt(plain)
    assert type(made.conv) is Conv3d and made.all[0] is made.conv
    assert made.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    torch.testing.assert_close(made(x), wanted)


def test_instance_normalisation_is_exchanged_where_asked():
    assert type(adapt(Twice(), norm="batch").all[1]) is BatchNorm3d
    assert type(adapt(Twice(), norm="group").all[1]) is nn.GroupNorm
    made = adapt(Twice()).all[1]
    assert type(made) is InstanceNorm3d and not made.affine and made.eps == 1e-5


SIDES = [(1, 1, 1), (1, 3, 2), (1, 5, 1), (2, 1, 5), (2, 2, 2), (2, 4, 3), (3, 1, 4), (3, 5, 1), (3, 3, 3), (4, 2, 4), (4, 5, 3), (5, 6, 5)]


@pytest.mark.parametrize("kernel", [3, 5, (1, 3, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_in_bf16_are_right_on_maps_of_any_size(kernel, stride):
    torch.manual_seed(0)
    padding = tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2
    conv = adapt(nn.Sequential(nn.Conv3d(16, 16, kernel, stride=stride, padding=padding)))
    for sides in SIDES:
        assert_bf16_gradients_hold(conv, torch.randn(2, 16, *sides))


@pytest.mark.parametrize("kind", ["sigmoid", "conv"])
def test_gradients_in_bf16_of_a_restoration_head_are_right_on_small_maps(kind):
    torch.manual_seed(0)
    head = MidRestorationHead(16, kind=kind, norm="group")
    convs = [layer for layer in head.layers if isinstance(layer, nn.Conv3d) and layer.kernel_size == (3, 3, 3)]
    assert len(convs) == 1
    for sides in SIDES:
        assert_bf16_gradients_hold(convs[0], torch.randn(2, 16, *sides))


def assert_bf16_gradients_hold(conv, x):
    y = conv(x)
    seed = torch.randn(y.shape)
    parameters = list(conv.parameters())
    wanted = torch.autograd.grad(y, parameters, seed)
    for value in (float("nan"), 1e30) * 2:
        # What is allocated next may lie where these lay, so that unwritten memory would be seen.
        del [torch.full((2**k,), value) for k in range(6, 19)][:]
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.autograd.grad(conv(x), parameters, seed.bfloat16())
        for one, other in zip(found, wanted, strict=True):
            assert (one - other).abs().max() < 0.03 * other.abs().max(), tuple(x.shape)


def test_padding_by_hand_changes_no_value():
    torch.manual_seed(0)
    plain = nn.Conv3d(4, 6, (3, 5, 1), stride=(1, 2, 1), padding=(1, 4, 0), dilation=(1, 2, 1), groups=2)
    made = adapt(nn.Sequential(plain))
    for sides in SIDES:
        x = torch.randn(2, 4, *sides)
        torch.testing.assert_close(made(x), plain(x))
        with torch.no_grad():
            assert torch.equal(made(x), plain(x))
