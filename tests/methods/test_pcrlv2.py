"""PCRLv2: every term against an independent writing of section 3's formulas, and reach of every input and head."""

import math

import pytest
import torch
import torch.nn.functional as F

from volssl.augment.crops import PairCrops
from volssl.draws import Draws
from volssl.files import BadInput
from volssl.losses import siamese_distance
from volssl.methods.pcrlv2 import Comparison, PCRLv2, Restoration
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


def cos(a, b):
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()


def test_terms_equal_the_formulas_written_again():
    made = method()
    views = views_of(made)
    losses = loss_of(made, views, progress=0.25)

    again = method()
    net, batch = again.net, 2
    decoded = [net.decoder(net.encoder(x)) for x in (views.one.seen, views.other.seen, views.locals)]

    def head(level, features):
        pooled = features.mean((2, 3, 4))
        projector, predictor = again.comparison_heads[str(level)].projector, again.comparison_heads[str(level)].predictor
        z = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + projector.eps).sqrt()
        hidden = z @ predictor[0].weight.T + predictor[0].bias
        hidden = ((hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()).clamp(min=0)
        return z, hidden @ predictor[3].weight.T + predictor[3].bias

    g1 = views.one.target
    y1 = 1 / (1 + torch.exp(-F.conv3d(decoded[0][-1], again.final_head.weight, again.final_head.bias)))
    torch.testing.assert_close(losses["restore"], ((y1 - g1) ** 2).mean(), atol=1e-6, rtol=1e-5)

    s0 = views.scale
    layers = again.mid_heads[str(s0)].layers
    mid = F.conv3d(decoded[0][s0], layers[0].weight, layers[0].bias, padding=1)
    mid = 1 / (1 + torch.exp(-(mid - mid.mean()) / (mid.var(unbiased=False) + 1e-5).sqrt()))
    up = F.interpolate(mid, size=(16, 16, 16), mode="trilinear")
    beta = 0.5 * (1 + math.cos(math.pi * 0.25))
    torch.testing.assert_close(losses["restore_mid"], beta * ((up - g1) ** 2).mean(), atol=1e-6, rtol=1e-5)

    (z1, p1), (z2, p2) = head(s0, decoded[0][s0]), head(s0, decoded[1][s0])
    torch.testing.assert_close(losses["compare_globals"], -0.5 * (cos(p1, z2) + cos(p2, z1)), atol=1e-6, rtol=1e-5)

    total, pair = 0.0, 0
    for i in range(3):
        for view in (0, 1):
            s = views.local_scales[pair]
            z, p = head(s, decoded[view][s])
            zl, pl = (t[i * batch : (i + 1) * batch] for t in head(s, decoded[2][s]))
            total += -0.5 * (cos(p, zl) + cos(pl, z))
            pair += 1
    torch.testing.assert_close(losses["compare_locals"], total / 6, atol=1e-6, rtol=1e-5)


def test_no_gradient_passes_the_projections():
    z, w = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    p, q = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    siamese_distance(p, z, q, w).backward()
    assert z.grad is None and w.grad is None
    assert (p.grad.abs().sum(1) > 0).all() and (q.grad.abs().sum(1) > 0).all()
    assert float(siamese_distance(p, q, q, p).detach()) == pytest.approx(-1.0)


@pytest.mark.parametrize("poisoned", range(3))
def test_every_local_view_reaches_the_loss(poisoned):
    made = method()
    views = views_of(made)
    assert views.locals.shape == (6, 1, 8, 8, 8)
    views.locals.requires_grad_(True)
    loss_of(made, views)["compare_locals"].backward()
    assert (views.locals.grad.flatten(1).abs().sum(1) > 0).all()
    with torch.no_grad():
        views.locals[2 * poisoned] = float("nan")
    assert torch.isnan(loss_of(made, views)["compare_locals"])


def test_every_parameter_of_the_drawn_scales_moves():
    made = method()
    touched = set()
    for step in range(12):
        made.zero_grad()
        torch.stack(list(loss_of(made, views_of(made, step=step)).values())).sum().backward()
        touched |= {name for name, p in made.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    # A bias in front of batch normalisation moves nothing; its gradient is zero up to rounding, so it is left out of the claim.
    assert {n for n, _ in made.named_parameters() if not n.endswith("bias")} <= touched


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
