"""Layers of other packages are exchanged without a change of names, values or sharing."""

import torch
from torch import nn

from volssl.nets.adapt import Conv3d, adapt
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
    assert type(adapt(Twice()).all[1]) is nn.InstanceNorm3d


def test_gradients_in_bf16_are_right_where_the_input_is_shorter_than_the_kernel():
    torch.manual_seed(0)
    for side in (1, 2, 3):
        conv = adapt(nn.Sequential(nn.Conv3d(16, 16, 3, padding=1)))
        x = torch.randn(2, 16, side, 2, 2)
        seed = torch.randn(conv(x).shape)
        conv(x).backward(seed)
        wanted = conv[0].weight.grad.clone()
        for _ in range(5):
            del [torch.full((2**k,), 1e30) for k in range(6, 18)][:]  # so that unwritten memory would be seen
            conv.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                conv(x).backward(seed.bfloat16())
            assert (conv[0].weight.grad - wanted).abs().max() < 0.03 * wanted.abs().max()
