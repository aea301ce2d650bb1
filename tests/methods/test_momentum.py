"""The momentum target: its update by hand, what it is asked, where no gradient passes, and that nothing of it is there by default."""

import copy
import math

import pytest
import torch
from test_pcrlv2 import cos, loss_of, method, vectors, views_of
from torch import nn

from volssl.averages import follow, frozen_copy
from volssl.files import BadInput
from volssl.methods.momentum import MomentumTarget, momentum_at
from volssl.methods.pcrlv2 import Comparison
from volssl.recipe import parse

MOMENTUM = Comparison(target="momentum")


def moved(made, seed=3):
    """The method with its trained weights moved away from the copy, as after some steps."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in (made.net, made.comparison_heads):
            for parameter in part.parameters():
                parameter.add_(0.1 * (parameter.abs().mean() + 0.1) * torch.randn(parameter.shape, generator=source))
    return made


def gradients(made, views):
    made.zero_grad(set_to_none=True)
    torch.stack(list(loss_of(made, views).values())).sum().backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def test_the_running_mean_by_hand():
    net = nn.Linear(1, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0], [2.0]]))
        net.bias.zero_()
    mean = frozen_copy(net)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[5.0], [-2.0]]))
    follow(mean, net, decay=0.75)
    assert mean.weight.flatten().tolist() == [2.0, 1.0]  # 0.75 * 1 + 0.25 * 5; 0.75 * 2 - 0.25 * 2
    follow(mean, net, decay=0.5)
    assert mean.weight.flatten().tolist() == [3.5, -0.5] and mean.bias.tolist() == [0, 0]
    assert net.weight.flatten().tolist() == [5.0, -2.0], "the trained weights do not follow"


def test_the_momentum_rises_from_its_start_to_one():
    assert momentum_at(0.0, start=0.99) == pytest.approx(0.99, abs=1e-12)
    assert momentum_at(0.5, start=0.99) == pytest.approx(0.995, abs=1e-12)
    assert momentum_at(1.0, start=0.99) == 1.0
    assert momentum_at(1 / 3, start=0.6) == pytest.approx(1 - 0.4 * 0.75, abs=1e-12)


def test_after_a_step_every_weight_of_the_copy_has_moved_as_written():
    made = method(comparison=Comparison(target="momentum", momentum=0.6))
    before = {name: value.clone() for name, value in made.target.named_parameters()}
    moved(made)
    trained = {f"net.{name}": value for name, value in made.net.named_parameters()}
    for scale, head in made.comparison_heads.items():
        trained |= {f"projectors.{scale}.{name}": value for name, value in head.projector.named_parameters()}
    assert before.keys() == trained.keys() and not any("predictor" in name for name in before)
    made.after_step(0.25)
    tau = 1 - 0.4 * (math.cos(math.pi / 4) + 1) / 2
    for name, value in made.target.named_parameters():
        expected = tau * before[name] + (1 - tau) * trained[name].detach()
        torch.testing.assert_close(value, expected, atol=1e-7, rtol=1e-5, msg=name)
        assert not torch.equal(value, before[name]), name


def test_the_losses_equal_the_formulas_with_the_copys_projections():
    made = moved(method(comparison=MOMENTUM))
    views = views_of(made)
    seen = (views.one.seen, views.other.seen, views.locals)
    losses, was = loss_of(made, views), loss_of(method(), views)

    def predicted(view, scale):
        return made.comparison_heads[str(scale)](made.net(seen[view])[scale])[1]

    def projected(view, scale):
        # The first projector's scale is 1 and its shift 0 in the copy, which has not moved.
        return vectors(made, scale, made.target.net(seen[view])[scale])[0]

    def crop(rows, pair):
        return rows.view(3, 2, -1)[pair // 2]

    with torch.no_grad():
        s = views.scale
        of_globals = -0.5 * (cos(predicted(0, s), projected(1, s)) + cos(predicted(1, s), projected(0, s)))
        of_locals = 0.0
        for pair, s in enumerate(views.local_scales):
            one = cos(predicted(pair % 2, s), crop(projected(2, s), pair))
            of_locals = of_locals - 0.5 * (one + cos(crop(predicted(2, s), pair), projected(pair % 2, s))) / 6
    torch.testing.assert_close(losses["compare_globals"].detach(), of_globals, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(losses["compare_locals"].detach(), of_locals, atol=1e-6, rtol=1e-6)
    assert abs(float((losses["compare_globals"] - was["compare_globals"]).detach())) > 1e-4, "and it is not the trained network's own"


def test_before_the_first_update_it_is_the_stop_gradient():
    plain, followed = method(), method(comparison=MOMENTUM)
    views = views_of(plain)
    # Without a gradient nothing is padded by hand, so up to rounding.
    for name, loss in loss_of(plain, views).items():
        torch.testing.assert_close(loss_of(followed, views)[name], loss, atol=1e-6, rtol=1e-5)
    mine, theirs = gradients(followed, views), gradients(plain, views)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-5 + 1e-3 * float(gradient.abs().max()), rtol=1e-3, msg=name)


def test_no_gradient_and_no_optimiser_reaches_the_copy():
    made = moved(method(comparison=MOMENTUM))
    views = views_of(made)
    gradients(made, views)
    assert not any(p.requires_grad or p.grad is not None for p in made.target.parameters())
    assert not made.target(views.one.seen)[0].requires_grad
    [parameters] = made.parties().values()
    learnt = {id(p) for p in parameters}
    assert learnt.isdisjoint(id(p) for p in made.target.parameters())
    assert len(parameters) == len(list(method().parameters()))
    before = copy.deepcopy(made.target.state_dict())
    torch.optim.SGD(parameters, 0.1, weight_decay=0.1).step()
    weights = {name for name, _ in made.target.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in made.target.state_dict().items() if name in weights)


def test_every_part_of_the_copy_reaches_the_loss():
    # 20 steps draw every scale in every place; a part that is never read would leave the loss finite.
    made = method(comparison=MOMENTUM)
    steps = [views_of(made, step=step) for step in range(20)]
    for name, value in list(made.target.named_parameters()):
        if value.ndim < 2 and not name.startswith("projectors"):
            continue
        with torch.no_grad():
            kept = value.clone()
            value.fill_(float("nan"))
            assert any(not torch.isfinite(sum(loss_of(made, views).values())) for views in steps), name
            assert all(torch.isfinite(loss_of(made, views)["restore"]) for views in steps[:1]), "restoration is not the copy's"
            value.copy_(kept)


@pytest.mark.parametrize("view", ["one", "other", "locals"])
def test_every_view_passes_the_copy(view):
    made = method(comparison=MOMENTUM)
    drawn = views_of(made)
    asked = []
    made.target.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[0]))
    loss_of(made, drawn)
    x = drawn.locals if view == "locals" else getattr(drawn, view).seen
    assert len(asked) == 3 and any(one is x for one in asked)


def test_by_default_nothing_of_it_is_there():
    plain, followed = method(), method(comparison=MOMENTUM)
    assert plain.target is None and Comparison() == Comparison(target="stop_gradient", momentum=0.99)
    names = plain.state_dict().keys()
    assert not any(name.startswith("target.") for name in names)
    assert names == {name for name in followed.state_dict() if not name.startswith("target.")}
    assert all(torch.equal(value, followed.state_dict()[name]) for name, value in plain.state_dict().items()), "same first weights"
    assert method(comparison=Comparison(globals=0, locals=0, target="momentum")).target is None, "nothing is compared"


def test_a_frozen_copy_shares_no_memory():
    made = method(comparison=MOMENTUM)
    theirs = {p.data_ptr() for p in made.target.parameters()}
    assert isinstance(made.target, MomentumTarget) and theirs.isdisjoint(p.data_ptr() for p in made.net.parameters())


@pytest.mark.parametrize(
    "comparison, told",
    [
        ({"target": "momentum", "momentum": 1.5}, r"momentum must lie in \[0, 1\]; found 1.5"),
        ({"target": "momentum", "momentum": -0.1}, r"momentum must lie in \[0, 1\]; found -0.1"),
        ({"target": "momentum", "momentum": float("nan")}, r"momentum must lie in \[0, 1\]; found nan"),
        ({"target": "ema"}, "'stop_gradient' or 'momentum'; found 'ema'"),
    ],
)
def test_bad_values_are_refused(comparison, told):
    with pytest.raises(BadInput, match=f"method.comparison.*{told}"):
        parse({"method": {"name": "pcrlv2", "comparison": comparison}}, {"method": "methods"}, "mine")
