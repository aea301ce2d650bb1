"""Building blocks: gradients on maps so small that the kernel is wider than the map."""

import pytest
import torch

from volssl.nets.blocks import ConvBlock, UpBlock


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
