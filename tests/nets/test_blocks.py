"""Building blocks: gradients on maps so small that the kernel is wider than the map."""

import pytest
import torch
from torch import nn

from volssl.nets.blocks import ConvBlock, InstanceNorm3d, UpBlock, halved


def gradients(make, inputs, dtype):
    torch.manual_seed(0)
    module = make()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        module(*inputs).float().square().mean().backward()
    return {name: p.grad for name, p in module.named_parameters() if not name.endswith("conv.bias")}


@pytest.mark.parametrize("sides", [(1, 1, 1), (2, 2, 2), (4, 4, 4), (3, 1, 4), (2, 5, 3), (4, 3, 1), (2, 1, 2)])
@pytest.mark.parametrize("block", ["conv", "up"])
def test_gradients_in_bf16_are_those_of_fp32_on_small_maps(block, sides):
    x = torch.randn(4, 32, *sides, generator=torch.Generator().manual_seed(1))
    make = {
        "conv": lambda: ConvBlock(32, 64, norm="group"),
        "up": lambda: UpBlock(32, 16, skip_channels=0, norm="group"),
    }
    wanted = gradients(make[block], [x], torch.float32)
    for _ in range(20):
        dirty = [torch.full((n,), float("nan")) for n in (1000, 10_000, 100_000, 500_000)]
        del dirty  # what is allocated next may lie where these lay
        found = gradients(make[block], [x], torch.bfloat16)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=0.05 * float(gradient.abs().max()), rtol=0.05, msg=name)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("mean", "sd"), [(0, 1), (10, 1), (-30, 1), (100, 1), (0, 1e-3), (0.1, 1e-3), (3, 0), (0, 0)])
def test_instance_normalisation_of_bf16_maps_is_that_of_float64(mean, sd, affine):
    torch.manual_seed(0)
    norm = InstanceNorm3d(6, affine=affine)
    if affine:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    x = (torch.randn(2, 6, 40, 33, 27) * sd + mean * torch.linspace(0.5, 1, 6).view(-1, 1, 1, 1)).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last_3d)
    centred = x.double() - x.double().mean((2, 3, 4), keepdim=True)
    wanted = centred / (centred.square().mean((2, 3, 4), keepdim=True) + norm.eps).sqrt()
    if affine:
        wanted = wanted * norm.weight.double().view(-1, 1, 1, 1) + norm.bias.double().view(-1, 1, 1, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.is_contiguous(memory_format=torch.channels_last_3d) and found.dtype == torch.bfloat16
    wanted = wanted.detach()
    torch.testing.assert_close(found.double(), wanted, atol=0.02 * (1 + float(wanted.abs().max()) / 4), rtol=0.01)


def test_instance_normalisation_is_torchs_own_where_something_is_learned_or_all_is_fp32():
    torch.manual_seed(0)
    norm, own = InstanceNorm3d(4, affine=True), nn.InstanceNorm3d(4, affine=True)
    x = torch.randn(1, 4, 5, 6, 7).contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(norm(x.bfloat16()), own(x.bfloat16()))
    with torch.no_grad():
        assert torch.equal(norm(x), own(x))
        with pytest.raises(ValueError, match="more than 1 spatial element"):
            norm(x[:, :, :1, :1, :1].bfloat16().contiguous(memory_format=torch.channels_last_3d))


def test_halving_keeps_the_type_of_a_map_also_where_nothing_is_learned():
    x = torch.randn(1, 2, 4, 4, 4).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = halved(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found[0, 1, 0, 0, 0], x[0, 1, :2, :2, :2].max())
