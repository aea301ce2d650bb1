"""Kernels shared by the passes of one loss: the same numbers from one composition, none stale, none after its graph is gone."""

import copy
from contextlib import nullcontext

import pytest
import torch

from volssl.nets import composed
from volssl.nets.composed import shared_kernels
from volssl.nets.unet import UNet

SIDES = ((16, 16, 8), (16, 16, 8), (8, 8, 8))


@pytest.fixture
def compositions(monkeypatch):
    done = []
    original = composed._compose
    monkeypatch.setattr(composed, "_compose", lambda *parts: (done.append(1), original(*parts))[1])
    return done


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return UNet(width=4, depth=3, norm="instance").to(dtype)


def inputs(dtype=torch.float32, number=0):
    source = torch.Generator().manual_seed(number)
    return [torch.randn(2, 1, *size, generator=source).to(dtype) for size in SIDES]


def loss_of(made, xs, *, shared=True, bf16=False):
    with shared_kernels() if shared else nullcontext(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        maps = [made(x) for x in xs]
    return torch.stack([m.float().square().mean() if m.dtype != torch.double else m.square().mean() for of in maps for m in of]).sum()


def gradients(made):
    found = {name: p.grad for name, p in made.named_parameters()}
    made.zero_grad(set_to_none=True)
    return found


def close(one, other, tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        # A bias in front of a normalisation has no gradient but rounding.
        if not name.endswith(("conv.bias", "up.bias")):
            assert float((value - other[name]).norm()) <= tolerance * float(value.norm()), name


@pytest.mark.parametrize(
    "dtype, bf16, tolerance", [(torch.double, False, 1e-10), (torch.float32, False, 2e-5), (torch.float32, True, 0.05)]
)
def test_gradients_stay_what_they_are(compositions, dtype, bf16, tolerance):
    made = net(dtype)
    loss_of(made, inputs(dtype), shared=False, bf16=bf16).backward()
    alone, times = gradients(made), len(compositions)
    compositions.clear()
    loss_of(made, inputs(dtype), bf16=bf16).backward()
    close(alone, gradients(made), tolerance)
    # Two up-steps, of each the kernel and the map of its bias; not once for each of the three passes.
    assert len(compositions) == 4 < times


def test_in_bf16_the_gradients_of_the_passes_are_added_in_float32():
    made = net()
    up, weight = made.decoder.steps[0].up, made.decoder.steps[0].block.conv.weight
    seeds = [torch.ones(()), torch.tensor(2.0**-10), torch.tensor(2.0**-10)]
    with shared_kernels(), torch.autocast("cpu", torch.bfloat16):
        kernels = [composed._kernel(up, "weight", weight) for _ in seeds]
        assert {kernel.dtype for kernel in kernels} == {torch.bfloat16} and len({kernel.data_ptr() for kernel in kernels}) == 1
        whole, _ = composed._SHARED.get()[next(iter(composed._SHARED.get()))]
    [gradient] = torch.autograd.grad(
        kernels, whole, [seed.bfloat16().expand_as(kernel) for seed, kernel in zip(seeds, kernels, strict=True)]
    )
    assert gradient.dtype == torch.float32 and torch.equal(gradient, torch.full_like(gradient, 1 + 2.0**-9))


def test_accumulated_batches_each_have_their_own_and_add_up():
    made = net()
    losses = []
    for number in (0, 1):
        loss_of(made, inputs(number=number)).backward()  # frees what its passes shared
        losses.append(copy.deepcopy({name: p.grad for name, p in made.named_parameters()}))
    both = gradients(made)
    loss_of(made, inputs(number=1), shared=False).backward()
    second = gradients(made)
    close(both, {name: losses[0][name] + second[name] for name in both}, 1e-5)


def test_changed_weights_and_other_precisions_are_composed_anew(compositions):
    made = net()
    x = inputs()[0]
    with shared_kernels(), torch.no_grad():
        first = made(x)[-1]
        assert torch.equal(made(x)[-1], first) and len(compositions) == 4
        made.decoder.steps[1].up.weight.mul_(1.5)
        changed = made(x)[-1]
        with torch.autocast("cpu", torch.bfloat16):
            made(x)
    assert len(compositions) == 4 + 2 + 4
    with torch.no_grad():
        assert torch.equal(made(x)[-1], changed) and not torch.equal(changed, first)
    with shared_kernels():
        with torch.no_grad():
            made(x)
        made(x)[-1].sum().backward()
    assert made.decoder.steps[0].up.weight.grad is not None


def test_nothing_is_kept_after_the_passes_and_the_weights_keep_their_names():
    made = net()
    before = list(made.state_dict())
    loss_of(made, inputs()).backward()
    assert composed._SHARED.get() is None and list(made.state_dict()) == before
    with pytest.raises(ZeroDivisionError), shared_kernels():
        _ = 1 / 0
    assert composed._SHARED.get() is None
