"""The ablations of docs/pcrlv2.md: each setting, given as a recipe would give it, does what the table says."""

import pytest
import torch

from volssl.draws import Draws
from volssl.files import BadInput
from volssl.recipe import parse
from volssl.running import Training

SMALL = {
    "crops": {"global_sizes_vox": [[16, 16, 16], [20, 20, 16]], "locals": 2, "local_sizes_vox": [[8, 8, 8]]},
    "out_vox": [[16, 16, 16], [8, 8, 8]],
}
BOX = (32, 32, 32)


def merged(under, over):
    return {**under, **{k: merged(under[k], v) if isinstance(v, dict) and isinstance(under.get(k), dict) else v for k, v in over.items()}}


def build(net=None, **settings):
    values = {
        "net": {"name": "unet", "width": 4, "depth": 4, **(net or {})},
        "method": merged({"name": "pcrlv2", **SMALL}, settings),
        "training": {},
    }
    made = parse(values, {"net": "nets", "method": "methods", "training": Training}, "ablation")
    torch.manual_seed(0)
    return made["method"].build(made["net"].build()).train()


def views_of(made, batch=2, step=0):
    x = torch.rand(batch, 1, *BOX, generator=torch.Generator().manual_seed(1))
    return made.views(x, Draws(0, step, 0, batch), spacing_mm=(1.0, 1.0, 1.0))


def losses_of(made, progress=0.5, **more):
    [(_, losses)] = list(made.turns(views_of(made, **more), progress))
    return losses


def test_number_of_scales():
    assert build().scales == (0, 1, 2)
    made = build(comparison={"decoder_scales": [2]})
    assert {views_of(made, step=step).scale for step in range(10)} == {2}
    assert {s for step in range(10) for s in views_of(made, step=step).local_scales} == {2}
    assert set(made.comparison_heads) == set(made.mid_heads) == {"2"}
    two = build(comparison={"decoder_scales": [2, 0]})
    assert {views_of(two, step=step).scale for step in range(20)} == {0, 2}
    torch.stack(list(losses_of(two).values())).sum().backward()
    assert not any(p.grad is None for n, p in two.named_parameters() if n.startswith("net."))
    for wrong in ([3], [-1], [0, 0]):
        with pytest.raises(BadInput, match=r"decoder_scales: must be different numbers of the decoder's 3 maps"):
            build(comparison={"decoder_scales": wrong})


def test_skips():
    skips, plain = build(net={"skips": True}), build()
    # With skips the decoder sees the fine maps of the encoder, without them only the deepest.
    for made, seen in ((skips, True), (plain, False)):
        made.eval()
        fine, deepest = torch.randn(1, 8, 16, 16, 16), torch.randn(1, 64, 2, 2, 2)
        others = [torch.randn(1, 16, 8, 8, 8), torch.randn(1, 32, 4, 4, 4), deepest]
        with torch.no_grad():
            changed = not torch.equal(made.net.decoder([fine, *others])[-1], made.net.decoder([2 * fine, *others])[-1])
        assert changed == seen
    assert set(losses_of(skips)) == set(losses_of(plain))


def test_without_restoration_or_comparison_nothing_of_it_is_there():
    compared = build(restoration={"views": "none"})
    assert set(losses_of(compared)) == {"compare_globals", "compare_locals"}
    assert not compared.mid_heads and compared.final_head is None and "restored" not in compared.pictures(views_of(compared))
    restored = build(comparison={"globals": 0, "locals": 0})
    assert set(losses_of(restored)) == {"restore", "restore_mid"} and not restored.comparison_heads
    assert len(views_of(restored).locals) == 0, "no sub-crops are made for nobody"
    globals_only = build(comparison={"locals": 0})
    assert set(losses_of(globals_only)) == {"restore", "restore_mid", "compare_globals"}
    for made in (compared, restored, globals_only):
        seen = set()
        for step in range(12):
            made.zero_grad(set_to_none=True)
            torch.stack(list(losses_of(made, step=step).values())).sum().backward()
            seen |= {n for n, p in made.named_parameters() if p.grad is not None}
        assert seen == {n for n, _ in made.named_parameters()}, "no parameter is left over"


def test_views_restored():
    counted = {"first": 1, "both": 2}
    for views, number in counted.items():
        made = build(restoration={"views": views})
        drawn = views_of(made)
        with torch.no_grad():
            finals = [torch.nn.functional.mse_loss(made._final(made.net(v.seen)), v.target) for v in (drawn.one, drawn.other)]
            [(_, losses)] = list(made.turns(drawn, 0.0))
        torch.testing.assert_close(losses["restore"], sum(finals[:number]))


def test_final_head_and_fading():
    made = build(restoration={"final": False, "fade": False})
    with torch.no_grad():
        assert set(losses_of(made)) == {"restore_mid", "compare_globals", "compare_locals"}
        assert float(losses_of(made, 1.0)["restore_mid"]) > 0
        faded = build()
        start, middle, end = (float(losses_of(faded, p)["restore_mid"]) for p in (0.0, 0.5, 1.0))
    assert middle == pytest.approx(start / 2, rel=1e-5) and end == pytest.approx(0, abs=1e-9)


def test_head_types():
    code, paper = build(restoration={"head": "sigmoid"}), build(restoration={"head": "conv"})
    maps = code.net(views_of(code).one.seen)
    restored = code._mid(maps, 0).detach()
    assert float(restored.min()) >= 0 and float(restored.max()) <= 1
    assert [type(layer).__name__ for layer in code.mid_heads["0"].layers][::2] == ["Conv3d", "Sigmoid"]
    assert [type(layer).__name__ for layer in paper.mid_heads["0"].layers][::3] == ["Conv3d", "Conv3d"]


def test_local_mean_and_sum():
    mean, total = build(), build(comparison={"reduction": "sum"})
    with torch.no_grad():
        torch.testing.assert_close(losses_of(total)["compare_locals"], 4 * losses_of(mean)["compare_locals"])


def test_target_of_the_comparison():
    plain, followed = build(comparison={"target": "stop_gradient"}), build(comparison={"target": "momentum", "momentum": 0.0})
    assert plain.target is None and followed.target.start == 0.0
    for made in (plain, followed):  # one step of the optimiser, after which the stop-gradient's target has moved with the weights
        torch.stack(list(losses_of(made).values())).sum().backward()
        torch.optim.SGD(made.parties()["all"], 0.01).step()
    with torch.no_grad():
        stale = losses_of(followed)["compare_globals"]
        followed.after_step(0.0)  # at momentum 0 the copy is the network
        torch.testing.assert_close(losses_of(followed)["compare_globals"], losses_of(plain)["compare_globals"], atol=1e-5, rtol=1e-4)
        assert abs(float(stale - losses_of(followed)["compare_globals"])) > 1e-4


def test_number_and_sizes_of_sub_crops():
    made = build(crops={"locals": 5, "local_sizes_vox": [[4, 6, 8]]})
    views = views_of(made)
    assert len(views.locals) == 5 * 2 and len(views.local_scales) == 10
    assert all((box.size_B3 == torch.tensor([4, 6, 8])).all() for box in views.boxes[2:])
    none = build(crops={"locals": 0})
    assert set(losses_of(none)) == {"restore", "restore_mid", "compare_globals"}


def test_multi_crop_takes_sub_crops_from_anywhere():
    def outside(made):
        number = 0
        for step in range(8):
            one, other, *crops = views_of(made, batch=8, step=step).boxes
            low = torch.minimum(one.start_B3, other.start_B3)
            high = torch.maximum(one.start_B3 + one.size_B3, other.start_B3 + other.size_B3)
            number += sum(int(((c.start_B3 < low) | (c.start_B3 + c.size_B3 > high)).any(1).sum()) for c in crops)
        return number

    assert outside(build()) == 0 < outside(build(crops={"local_region": "anywhere"}))


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_normalisation_of_net_and_heads(norm):
    made = build(net={"norm": norm, "depth": 3}, comparison={"norm": norm}, restoration={"norm": norm})
    kinds = {type(m).__name__ for m in made.modules() if "Norm" in type(m).__name__}
    expected = {"batch": {"BatchNorm3d", "BatchNorm1d"}, "instance": {"InstanceNorm3d", "GroupNorm"}, "group": {"GroupNorm"}}[norm]
    assert kinds == expected
    assert all(torch.isfinite(v) for v in losses_of(made).values())


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_a_batch_of_one_is_refused_by_batch_norm_and_taken_by_the_others(norm):
    with pytest.raises(BadInput, match=r"at least 2 samples over all processes; found 1; raise it, or set method.comparison.norm"):
        build().check(BOX, 1)
    net = {"norm": "group", "depth": 3}
    made = build(net=net, comparison={"norm": norm})
    made.check(BOX, 1)
    one = losses_of(made, batch=1)
    assert all(torch.isfinite(v) for v in one.values())
    torch.stack(list(one.values())).sum().backward()
    # A sample's own statistics: its embedding does not depend on its batch.
    head = made.comparison_heads["0"].eval()
    x = torch.randn(3, 16, 2, 2, 2)
    torch.testing.assert_close(head(x)[1][:1], head(x[:1])[1])
