"""PCRLv2: every term against an independent writing of section 3's formulas, and reach of every input and head."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from volssl.augment.crops import PairCrops
from volssl.draws import Draws
from volssl.files import BadInput
from volssl.losses import siamese_distance
from volssl.methods.pcrlv2 import Comparison, PCRLv2, Restoration, View
from volssl.nets.unet import UNet
from volssl.recipe import parse

CROPS = PairCrops(global_sizes_vox=((16, 16, 16), (20, 20, 16)), locals=3, local_sizes_vox=((8, 8, 8), (4, 4, 4)))
BOX = (28, 28, 24)


def method(**settings):
    torch.manual_seed(0)
    net = UNet(width=4, depth=settings.pop("depth", 3))
    return PCRLv2(net, crops=CROPS, out_vox=((16, 16, 16), (8, 8, 8)), **settings).train()


def views_of(made, batch=2, step=0):
    x = torch.rand(batch, 1, *BOX, generator=torch.Generator().manual_seed(1))
    return made.views(x, Draws(0, step, 0, batch), spacing_mm=(1.0, 1.0, 1.0))


def loss_of(made, views, progress=0.25):
    [(party, losses)] = list(made.turns(views, progress))
    assert party == "all"
    return losses


# ------------------------------------------------------------------------------------------------ section 3, written again


def cos(a, b):
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()


def standard(x, eps, axes):
    """Batch normalisation with its first weights: scale 1, shift 0."""
    return (x - x.mean(axes, keepdim=True)) / (x.var(axes, unbiased=False, keepdim=True) + eps).sqrt()


def vectors(made, scale, features):
    """z and p of the decoded map of one scale."""
    head = made.comparison_heads[str(scale)]
    z = standard(features.mean((2, 3, 4)), 1e-5, 0)
    first, last = head.predictor[0], head.predictor[3]
    hidden = standard(z @ first.weight.T + first.bias, 1e-5, 0).clamp(min=0)
    return z, hidden @ last.weight.T + last.bias


def distance(one, other):
    """D(a, b; s) of vectors (z, p)."""
    return -0.5 * (cos(one[1], other[0]) + cos(other[1], one[0]))


def restored_at(made, scale, features, size):
    """The mid head of one scale: Conv-BN(1)-sigmoid of the code, or Conv-BN-ReLU-Conv of the paper."""
    layers = made.mid_heads[str(scale)].layers
    m = standard(F.conv3d(features, layers[0].weight, layers[0].bias, padding=1), 1e-5, (0, 2, 3, 4))
    if made.restoration.head == "sigmoid":
        m = 1 / (1 + torch.exp(-m))
    else:
        m = F.conv3d(m.clamp(min=0), layers[3].weight, layers[3].bias)
    return F.interpolate(m, size=size, mode="trilinear", align_corners=False)


def terms_again(made, views, progress):
    """All terms of the specification, from the decoded maps on."""
    batch, sub_crops = len(views.one.seen), len(views.local_scales) // 2
    globals_ = [made.net.decoder(made.net.encoder(view.seen)) for view in (views.one, views.other)]
    locals_ = made.net.decoder(made.net.encoder(views.locals))
    sides = (0,) if made.restoration.views == "first" else (0, 1)
    targets = [views.one.target, views.other.target]
    terms = {}
    if made.restoration.final:
        outputs = [F.conv3d(globals_[i][-1], made.final_head.weight, made.final_head.bias) for i in sides]
        terms["restore"] = sum(((1 / (1 + torch.exp(-y)) - targets[i]) ** 2).mean() for y, i in zip(outputs, sides, strict=True))
    beta = 0.5 * (1 + math.cos(math.pi * progress)) if made.restoration.fade else 1.0
    s0 = views.scale
    squares = [((restored_at(made, s0, globals_[i][s0], made.global_vox) - targets[i]) ** 2).mean() for i in sides]
    terms["restore_mid"] = beta * sum(squares)
    terms["compare_globals"] = distance(*(vectors(made, s0, globals_[i][s0]) for i in (0, 1)))
    total, pair = 0.0, 0
    for i in range(sub_crops):
        for view in (0, 1):
            s = views.local_scales[pair]
            of_crop = tuple(t[i * batch : (i + 1) * batch] for t in vectors(made, s, locals_[s]))
            total = total + distance(vectors(made, s, globals_[view][s]), of_crop)
            pair += 1
    terms["compare_locals"] = total / (2 * sub_crops) if made.comparison.reduction == "mean" else total
    return terms


def preset(name, **more):
    values = PCRLv2.PRESETS[name]
    parts = {"restoration": Restoration, "comparison": Comparison}
    return method(**{key: kind(**values.get(key, {})) for key, kind in parts.items()}, **more)


@pytest.mark.parametrize("name", ["official", "paper"])
@pytest.mark.parametrize("progress", [0.0, 0.25, 0.8])
@pytest.mark.parametrize("step", [0, 1, 5])
def test_every_term_equals_the_formula_written_again(name, progress, step):
    # In double precision: with three samples batch normalisation blows float32's rounding up to 1e-6.
    made = preset(name)
    views = views_of(made, batch=3, step=step)
    doubled = {name: View(view.seen.double(), view.target.double()) for name, view in (("one", views.one), ("other", views.other))}
    views = dataclasses.replace(views, locals=views.locals.double(), **doubled)
    with torch.no_grad():
        found, wanted = loss_of(made.double(), views, progress), terms_again(preset(name).double(), views, progress)
    assert found.keys() == wanted.keys()
    assert set(found) == {"restore_mid", "compare_globals", "compare_locals"} | ({"restore"} if name == "official" else set())
    for term, value in wanted.items():
        assert float(found[term]) == pytest.approx(float(value), abs=1e-6), term


def test_no_gradient_passes_the_targets_of_the_comparison():
    # With the stop-gradient the loss pulls predictions only: the same loss with the projections detached by hand has the same gradients.
    made = method(restoration=Restoration(views="none"))
    views = views_of(made)
    torch.stack(list(loss_of(made, views).values())).sum().backward()
    found = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}

    again = method(restoration=Restoration(views="none"))
    maps = [again.net(x) for x in (views.one.seen, views.other.seen, views.locals)]

    def pulled(one, other):
        return -0.5 * (cos(one[1], other[0].detach()) + cos(other[1], one[0].detach()))

    loss = pulled(*(vectors(again, views.scale, m[views.scale]) for m in maps[:2]))
    for pair, s in enumerate(views.local_scales):
        crop = tuple(t.view(3, 2, -1)[pair // 2] for t in vectors(again, s, maps[2][s]))
        loss = loss + pulled(vectors(again, s, maps[pair % 2][s]), crop) / 6
    loss.backward()
    compared = 0
    for name, p in again.named_parameters():
        # A shift in front of batch normalisation, and the heads' own scale and shift written as 1 and 0 above, are left out.
        if p.grad is not None and p.ndim > 1:
            torch.testing.assert_close(found[name], p.grad, atol=1e-4 * float(p.grad.abs().max()) + 1e-7, rtol=1e-3, msg=name)
            compared += 1
    assert compared > 10


def test_no_gradient_passes_the_projections():
    z, w = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    p, q = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    siamese_distance(p, z, q, w).backward()
    assert z.grad is None and w.grad is None
    assert (p.grad.abs().sum(1) > 0).all() and (q.grad.abs().sum(1) > 0).all()
    assert float(siamese_distance(p, q, q, p).detach()) == pytest.approx(-1.0)


@pytest.mark.parametrize("name", ["official", "paper"])
@pytest.mark.parametrize("poisoned", range(6))
def test_a_nan_in_any_one_sub_crop_makes_the_loss_nan(name, poisoned):
    made = preset(name)
    views = views_of(made)
    assert views.locals.shape == (6, 1, 8, 8, 8)
    with torch.no_grad():
        assert torch.isfinite(loss_of(made, views)["compare_locals"])
        views.locals[poisoned, 0, 3, 4, 5] = float("nan")
        assert torch.isnan(loss_of(made, views)["compare_locals"])


def test_every_local_view_gets_a_gradient():
    made = method()
    views = views_of(made)
    views.locals.requires_grad_(True)
    loss_of(made, views)["compare_locals"].backward()
    assert (views.locals.grad.flatten(1).abs().sum(1) > 0).all()


def test_every_parameter_of_the_drawn_scales_moves():
    made = method()
    touched = set()
    for step in range(12):
        made.zero_grad()
        torch.stack(list(loss_of(made, views_of(made, step=step)).values())).sum().backward()
        touched |= {name for name, p in made.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    # A bias in front of batch normalisation moves nothing; its gradient is zero up to rounding, so it is left out of the claim.
    assert {n for n, _ in made.named_parameters() if not n.endswith("bias")} <= touched


@pytest.mark.parametrize("name", ["official", "paper"])
def test_heads_that_take_part_in_a_step_get_a_gradient_and_no_others(name):
    made = preset(name)
    for step in range(4):
        made.zero_grad(set_to_none=True)
        views = views_of(made, step=step)
        torch.stack(list(loss_of(made, views).values())).sum().backward()
        moved = {n for n, p in made.named_parameters() if p.grad is not None and "heads." in n}
        wanted = {f"comparison_heads.{s}" for s in {views.scale, *views.local_scales}} | {f"mid_heads.{views.scale}"}
        assert {".".join(n.split(".")[:2]) for n in moved} == wanted
        for head in wanted:
            weights = [p for n, p in made.named_parameters() if n.startswith(head + ".") and p.ndim > 1]
            assert weights and all(float(p.grad.abs().sum()) > 0 for p in weights)
        assert made.final_head is None or float(made.final_head.weight.grad.abs().sum()) > 0


def test_target_is_the_clean_crop_and_input_is_not():
    made = method()
    views = views_of(made)
    plain = method(
        corruption=type(made.corruption)(
            *(
                type(t)(**off)
                for t, off in zip(
                    (made.corruption.blur, made.corruption.noise, made.corruption.gamma, made.corruption.swap),
                    ({"sigma_max": 0.0}, {"sd_max": 0.0}, {"log_max": 0.0}, {"swaps": 0}),
                    strict=True,
                )
            )
        )
    )
    clean = views_of(plain)
    assert torch.equal(views.one.target, clean.one.target) and torch.equal(views.other.target, clean.other.target)
    assert float(views.one.target.min()) >= 0 and float(views.one.target.max()) <= 1
    difference = (views.one.seen - clean.one.seen).abs().mean()
    assert float(difference) > 0.1
    z = views.one.target
    z = (z - z.mean((1, 2, 3, 4), keepdim=True)) / z.std((1, 2, 3, 4), keepdim=True, correction=0)
    torch.testing.assert_close(clean.one.seen, z, atol=1e-3, rtol=1e-3)


def test_scale_is_shared_by_the_step_and_changes_with_it():
    made = method()
    scales = [views_of(made, step=step).scale for step in range(20)]
    assert set(scales) == {0, 1}
    assert views_of(made, step=3).scale == made.views(torch.rand(5, 1, *BOX), Draws(0, 3, 7, 5), spacing_mm=(1.0, 1.0, 1.0)).scale


def test_official_draws_thirteen_scales_and_paper_one():
    official, paper = preset("official"), preset("paper")
    drawn = [views_of(official, step=step) for step in range(30)]
    assert any(len(set(views.local_scales)) > 1 for views in drawn)
    # Each of the 1 + 2 * 3 places is drawn on its own and takes every scale.
    for place in range(6):
        assert {views.local_scales[place] for views in drawn} == {0, 1}
    assert any(views.scale != views.local_scales[0] for views in drawn)
    assert all(set(v.local_scales) == {v.scale} for v in (views_of(paper, step=step) for step in range(10)))


def test_mid_term_fades_out():
    made = method()
    views = views_of(made)
    with torch.no_grad():
        start, end = loss_of(made, views, 0.0), loss_of(made, views, 1.0)
    assert float(start["restore_mid"]) > 0 and float(end["restore_mid"]) == pytest.approx(0.0, abs=1e-9)


def test_switches_leave_terms_out():
    made = method(restoration=Restoration(views="none"))
    assert set(loss_of(made, views_of(made))) == {"compare_globals", "compare_locals"}
    made = method(comparison=Comparison(globals=0.0, locals=0.0))
    assert set(loss_of(made, views_of(made))) == {"restore", "restore_mid"}
    one, both = method(), method(restoration=Restoration(views="both"))
    views = views_of(one)
    with torch.no_grad():
        assert float(loss_of(both, views)["restore"]) > 1.5 * float(loss_of(one, views)["restore"])


def test_impossible_settings_are_refused_together():
    with pytest.raises(BadInput) as caught:
        PCRLv2(UNet(width=4), crops=CROPS, out_vox=((20, 16, 16), (8, 8, 8))).check((18, 18, 18), 1)
    for part in ("must fit into the box", "multiple of the net's stride 8", "at least 2"):
        assert part in str(caught.value)


def test_official_head_counts():
    made = PCRLv2(UNet())
    assert sum(p.numel() for p in made.parameters()) == 17_111_434


def test_presets_set_what_code_and_paper_differ_in_and_the_recipe_wins():
    values = {"method": {"name": "pcrlv2", "preset": "paper", "restoration": {"fade": True}}}
    made = parse(values, {"method": "methods"}, "mine")["method"].build(UNet(width=4, depth=3))
    assert made.restoration == Restoration(views="both", head="conv", final=False, fade=True)
    assert made.comparison == Comparison(reduction="sum", scales="shared") and made.crops.tissue.rule == "none"
    official = parse({"method": {"name": "pcrlv2", "preset": "official"}}, {"method": "methods"}, "mine")["method"].build(UNet(width=4))
    assert official.restoration == Restoration() and official.crops.tissue.rule == "body"
    with pytest.raises(BadInput, match=r"preset: must be one of official, paper; found 'papre'"):
        parse({"method": {"name": "pcrlv2", "preset": "papre"}}, {"method": "methods"}, "mine")


def test_paper_terms():
    made = method(restoration=Restoration("both", "conv", final=False, fade=False), comparison=Comparison(reduction="sum", scales="shared"))
    views = views_of(made)
    assert set(views.local_scales) == {views.scale}
    losses = loss_of(made, views)
    assert set(losses) == {"restore_mid", "compare_globals", "compare_locals"}
    again = method(restoration=Restoration("both", "conv", final=False, fade=False), comparison=Comparison(scales="shared"))
    with torch.no_grad():
        maps = [again.net(v.seen) for v in (views.one, views.other)]
        squares = [
            ((again.mid_heads[str(views.scale)](m[views.scale], (16, 16, 16)) - v.target) ** 2).mean()
            for m, v in zip(maps, (views.one, views.other), strict=True)
        ]
        torch.testing.assert_close(losses["restore_mid"], squares[0] + squares[1], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(losses["compare_locals"], 6 * loss_of(again, views)["compare_locals"], atol=1e-5, rtol=1e-4)
    assert "restored" in made.pictures(views)
