"""When is looked, and that every look of a kind sees the same patches."""

import pytest
import torch
from test_pretrain import TINY, make_store

from volssl import pretrain, recipe, running, watch
from volssl.files import BadInput
from volssl.journal import Journal, read_metrics
from volssl.store import Store


def test_when_something_is_due():
    saving = watch.Saving(log_every=6, pictures_every=10, validate_every=15, health_every=0, probe_every=0)
    assert [step for step in range(1, 31) if saving.due(step)] == [6, 10, 12, 15, 18, 20, 24, 30]
    assert watch.Saving(log_every=100, probe_every=7).due(14) and not watch.Saving(log_every=100, health_every=0, probe_every=0).due(14)


def test_what_cannot_be_is_told_at_once():
    with pytest.raises(BadInput) as caught:
        watch.Saving(log_every=0, health_patches=1, probe_every=-1)
    for part in ("log_every >= 1 must hold; found 0", "health_patches >= 2 must hold; found 1", "probe_every >= 0 must hold; found -1"):
        assert part in str(caught.value)


def test_two_looks_at_one_network_see_the_same(tmp_path):
    store = Store.open(make_store(tmp_path / "store"))
    values = recipe.load("pcrlv2", [*TINY, "training.precision=fp32"], verb="pretrain")
    made = recipe.parse(values, pretrain.PARTS, "tiny")
    with torch.random.fork_rng():
        method = made["method"].build(made["net"].build())
    current = running.start(running.open_fabric("fp32"), method, made, store=store, out=tmp_path)
    first = watch._health(current, 8)
    current.steps_done = 5
    assert watch._health(current, 8) == first
    with Journal(tmp_path) as journal:
        watch.look_at_untrained(current, watch.Saving(probe_patches=8), journal)
        watch.look_at_untrained(current, watch.Saving(probe_patches=8), journal)
        watch.look_at_untrained(current, watch.Saving(probe_every=0), journal)
    one, other = read_metrics(tmp_path)
    assert one == other and one["step"] == 5
    assert method.training and all(part.training for part in method.modules())
