"""The running mean that a run leaves, by hand, and in a pretraining: what the bundle holds, and that it changes nothing else."""

import pytest
import torch
from safetensors.torch import load_file
from test_pretrain import _killed_at, make_store, same, state, train, untimed
from torch import nn

from volssl import pretrain
from volssl.averages import frozen_copy, keep_mean
from volssl.files import BadInput
from volssl.running import Training


def test_the_first_steps_count_less():
    net = nn.BatchNorm1d(1)
    mean = frozen_copy(net)
    seen = []
    for step, value in enumerate([11.0, 0.0, 24.0]):
        with torch.no_grad():
            net.weight.fill_(value)
            net.running_mean.fill_(100 + value)
        keep_mean(mean, net, average=0.2, step=step)
        seen.append(float(mean.weight))
    # Decays 1/10, 2/11 and then 0.2, below 3/12: from 1 to 0.1 + 0.9 * 11 = 10, to 2/11 * 10, to 0.2 * 20/11 + 0.8 * 24.
    assert seen == pytest.approx([10.0, 20 / 11, 4 / 11 + 19.2], rel=1e-6)
    assert float(mean.running_mean) == 124.0 and int(mean.num_batches_tracked) == 0, "statistics are the last ones"
    keep_mean(mean, net, average=0.0, step=9)
    assert float(mean.weight) == 24.0


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


SELDOM = ["training.steps=6", "saving.checkpoint_every=2", "saving.health_every=0", "saving.probe_every=0"]
SELDOM += ["saving.pictures_every=100", "saving.validate_every=100"]


def test_the_bundle_holds_the_mean_which_resumes_to_the_bit_and_changes_no_step(store, tmp_path, monkeypatch):
    trajectory, play = [], pretrain.play

    def recorded(current, patches, step):
        made = play(current, patches, step)
        trajectory.append({name: value.double().clone() for name, value in current.method.net.state_dict().items()})
        return made

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "play", recorded)
        train(store, tmp_path / "mean", *SELDOM, "training.average=0.25")
    train(store, tmp_path / "last", *SELDOM)
    mean, last = state(tmp_path / "mean"), state(tmp_path / "last")
    assert same({k: v for k, v in mean.items() if k != "averaged"}, last) and "averaged" not in last
    assert untimed(tmp_path / "mean") == untimed(tmp_path / "last")
    for part in ("encoder", "decoder"):
        held = load_file(tmp_path / "mean" / "bundle" / f"{part}.safetensors")
        assert held.keys() == load_file(tmp_path / "last" / "bundle" / f"{part}.safetensors").keys()
        for name, value in held.items():
            values = [weights[f"{part}.{name}"] for weights in trajectory]
            if "running" in name or "tracked" in name:
                assert torch.equal(value.double(), values[-1]), name
                continue
            # From the second step on (1 + step) / (10 + step) is 2/11, 3/12, then above 0.25; the first weights count next to nothing.
            first = state(tmp_path / "mean")["averaged"][f"{part}.{name}"]
            shares = [9 / 10, 9 / 11, 0.75, 0.75, 0.75, 0.75]
            rest, expected = 1.0, torch.zeros_like(values[0])
            for share, weights in zip(reversed(shares), reversed(values), strict=True):
                expected, rest = expected + rest * share * weights, rest * (1 - share)
            assert rest < 1e-4 and torch.equal(value, first)
            torch.testing.assert_close(value.double(), expected, atol=1e-4 * float(expected.abs().max()) + 1e-6, rtol=1e-4, msg=name)
    kernel = load_file(tmp_path / "mean" / "bundle" / "encoder.safetensors")["levels.0.0.conv.weight"]
    assert not torch.equal(kernel, last["method"]["net.encoder.levels.0.0.conv.weight"])

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "_step", _killed_at(4, pretrain._step))
        with pytest.raises(KeyboardInterrupt):
            train(store, tmp_path / "part", *SELDOM, "training.average=0.25")
    assert state(tmp_path / "part")["steps_done"] == 2
    train(store, tmp_path / "part", *SELDOM, "training.average=0.25", resume=True)
    assert same(state(tmp_path / "part"), mean)


@pytest.mark.parametrize("average", [1.0, -0.1, float("nan")])
def test_a_decay_that_is_none_is_refused(average):
    with pytest.raises(BadInput, match=r"average must lie in \[0, 1\); found"):
        Training(average=average)
