"""The U-Net: the paper's parameter counts, the composed up-step against the plain one, reach of every parameter."""

import pytest
import torch
import torch.nn.functional as F

from volssl.files import BadInput
from volssl.nets.blocks import UpBlock, halved
from volssl.nets.composed import _compose, composed_up_conv, composing_pays
from volssl.nets.heads import SegmentationNet
from volssl.nets.unet import UNet


def test_encoder_has_the_papers_parameters():
    net = UNet()
    assert sum(p.numel() for p in net.encoder.parameters()) == 7_027_776
    levels = [sum(p.numel() for p in level.parameters()) for level in net.encoder.levels]
    assert levels == [56_448, 332_352, 1_328_256, 5_310_720]
    decoder = 2_097_664 + 5_309_952 + 524_544 + 1_327_872 + 131_200 + 332_160
    assert sum(p.numel() for p in net.decoder.parameters()) == decoder


@pytest.mark.parametrize("size", [(3, 4, 5), (1, 1, 1), (2, 6, 3)])
def test_composed_up_step_equals_the_two_layers(size):
    torch.manual_seed(0)
    up = torch.nn.ConvTranspose3d(3, 3, 2, stride=2).double()
    weight = torch.randn(5, 3, 3, 3, 3, dtype=torch.double, requires_grad=True)
    x = torch.randn(2, 3, *size, dtype=torch.double, requires_grad=True)
    bias = torch.randn(5, dtype=torch.double, requires_grad=True)
    plain = F.conv3d(up(x), weight, bias, padding=1)
    composed = composed_up_conv(x, up, weight, bias)
    torch.testing.assert_close(composed, plain)
    inputs = [x, weight, up.weight, up.bias, bias]
    seed = torch.randn_like(plain)
    for one, other in zip(torch.autograd.grad(plain, inputs, seed), torch.autograd.grad(composed, inputs, seed), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("skip_channels", [0, 4])
def test_up_block_is_the_same_whichever_way_it_is_computed(monkeypatch, skip_channels):
    torch.manual_seed(0)
    block = UpBlock(6, 4, skip_channels=skip_channels, norm="instance")
    x = torch.randn(2, 6, 4, 4, 4)
    skip = torch.randn(2, skip_channels, 8, 8, 8) if skip_channels else None
    results = []
    for pays in (True, False):
        monkeypatch.setattr("volssl.nets.blocks.composing_pays", lambda *_, pays=pays: pays)
        results.append(block(x, skip))
    joined = block.up(x) if skip is None else torch.cat([block.up(x), skip], 1)
    plain = F.relu(block.block.norm(block.block.conv(joined)))
    torch.testing.assert_close(results[0], plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[1], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
@pytest.mark.parametrize("skips", [False, True])
def test_every_parameter_gets_a_gradient(norm, skips):
    torch.manual_seed(0)
    model = SegmentationNet(UNet(2, width=4, depth=3, norm=norm, skips=skips), 3, deep_supervision=True)
    outputs = model(torch.randn(2, 2, 16, 8, 8))
    assert [tuple(y.shape[2:]) for y in outputs] == [(16, 8, 8), (8, 4, 4)]
    sum(y.square().mean() for y in outputs).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert model(torch.randn(1, 2, 16, 8, 8)).shape == (1, 3, 16, 8, 8)


def test_feature_maps_are_finest_first():
    net = UNet(width=4, depth=3)
    maps = net.encoder(torch.randn(2, 1, 8, 8, 16))
    assert [m.shape[1] for m in maps] == list(net.encoder.channels) == [8, 16, 32]
    assert [m.shape[4] for m in maps] == [16, 8, 4]


def test_impossible_net_is_refused():
    with pytest.raises(BadInput, match="depth >= 2"):
        UNet(depth=1)


def test_a_forward_in_inference_mode_leaves_later_training_alone():
    net = UNet(width=2, depth=2)
    x = torch.zeros(1, 1, 8, 8, 8)
    with torch.inference_mode():
        net(x)
    net(x)[-1].sum().backward()


def test_a_composed_kernel_by_hand():
    # Along X alone: up-step taps (2, 3), convolution taps (5, 7, 11); 2 * reversed + 3 * reversed, one further.
    up, weight = torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 3, 3, 3)
    up[0, 0, :, 0, 0], weight[0, 0, :, 2, 2] = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0, 11.0])
    kernel = _compose(up, weight)
    assert kernel[0, 0, :, 0, 0].tolist() == [22.0, 14.0 + 33.0, 10.0 + 21.0, 15.0]
    assert float(kernel.sum()) == 5 * 23


def test_composing_keeps_float32_and_saves_only_the_weights():
    torch.manual_seed(0)
    up = torch.nn.ConvTranspose3d(32, 32, 2, stride=2)
    weight = (torch.randn(16, 32, 3, 3, 3) * 0.05).requires_grad_()
    x = torch.randn(2, 32, 6, 5, 4, requires_grad=True)
    plain = F.conv3d(up(x), weight, padding=1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        composed = composed_up_conv(x, up, weight)
    assert float((composed - plain).detach().abs().max() / plain.detach().abs().max()) < 3e-6
    assert max(saved) <= 32 * 16 * 64
    seed = torch.randn_like(plain)
    inputs = [x, weight, up.weight, up.bias]
    for one, other in zip(torch.autograd.grad(plain, inputs, seed), torch.autograd.grad(composed, inputs, seed), strict=True):
        assert float((one - other).abs().max() / one.abs().max()) < 2e-5


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 2, 2), (2, 3, 5), (4, 4, 2)])
def test_composed_gradients_under_bf16_are_those_of_float32(size):
    torch.manual_seed(0)
    up = torch.nn.ConvTranspose3d(16, 16, 2, stride=2)
    weight = (torch.randn(8, 16, 3, 3, 3) * 0.1).requires_grad_()
    x = torch.randn(2, 16, *size, requires_grad=True)
    seed = torch.randn(2, 8, *(2 * n for n in size))
    inputs = [x, weight, up.weight, up.bias]
    exact = torch.autograd.grad(F.conv3d(up(x), weight, padding=1), inputs, seed)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            composed = composed_up_conv(x, up, weight)
        for one, other in zip(exact, torch.autograd.grad(composed.float(), inputs, seed), strict=True):
            assert float((one - other).abs().max() / one.abs().max()) < 0.03


def test_composing_pays_where_maps_are_large():
    assert composing_pays(torch.empty(1, 128, 32, 32, 16, device="meta"), 64)
    assert not composing_pays(torch.empty(1, 512, 2, 2, 2, device="meta"), 256)


@pytest.mark.parametrize("bf16", [False, True])
def test_halving_is_max_pooling_and_keeps_only_its_input(bf16):
    x = torch.randn(2, 3, 6, 4, 8).relu().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t), torch.autocast("cpu", enabled=bf16):
        y = halved(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
    again = F.max_pool3d(x, 2)
    assert torch.equal(y, again)
    seed = torch.randn_like(again)
    assert torch.equal(torch.autograd.grad(y, x, seed)[0], torch.autograd.grad(again, x, seed)[0])
    with torch.no_grad():
        assert torch.equal(halved(x), again)
