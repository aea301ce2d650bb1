"""The pace of the encoder and the reading ahead, step by step."""

from types import SimpleNamespace

import pytest
import torch
from labelled import write_msd, write_recipe

from volssl import fitting
from volssl.files import BadInput
from volssl.finetune import Options, run
from volssl.fitting import EncoderPace, Optimisation
from volssl.journal import read_metrics
from volssl.nets.heads import SegmentationNet
from volssl.nets.resenc import ResEncUNet
from volssl.nets.unet import UNet


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_msd(tmp_path_factory.mktemp("data"), cases=4)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml")


def watched(monkeypatch, data, recipe, tmp_path, *overrides):
    """Copies of the network before each step and after the last, and the rates of each step."""
    copies, rates = [], []
    step = fitting._step

    def look(current, lr, cases):
        copies.append({name: tensor.clone() for name, tensor in current.net.state_dict().items()})
        norm = step(current, lr, cases)
        rates.append([(group.get("of_encoder"), group["lr"]) for group in current.optimizer.param_groups])
        copies[-1]["after"] = {name: tensor.clone() for name, tensor in current.net.state_dict().items()}
        return norm

    monkeypatch.setattr(fitting, "_step", look)
    run(recipe, data=data, out=tmp_path / "run", options=Options(overrides=overrides))
    return copies, rates


def moved(copy):
    return {name for name, tensor in copy["after"].items() if not torch.equal(tensor, copy[name])}


def test_a_frozen_encoder_stands_still_statistics_too_and_then_moves(monkeypatch, data, recipe, tmp_path):
    net = "net={name: unet, width: 4, depth: 2, norm: batch}"
    copies, _ = watched(monkeypatch, data, recipe, tmp_path, net, "optimisation.encoder.freeze=0.5")
    for step, copy in enumerate(copies[:-1]):  # the rate of the last step is 0
        assert any("encoder" in name for name in moved(copy)) == (step >= 3)
        assert any("decoder" in name for name in moved(copy))
    first, fourth = copies[0], copies[3]
    buffers = [name for name in first if "encoder" in name and "running" in name]
    assert buffers and all(torch.equal(first[name], copies[2]["after"][name]) for name in buffers)
    assert all(not torch.equal(fourth[name], copies[4][name]) for name in buffers)


def test_the_sawtooth_starts_with_the_decoder(monkeypatch, data, recipe, tmp_path):
    wanted = ("optimisation.schedule=sawtooth", "optimisation.warmup=0.34", "optimisation.encoder.lr=0.5")
    copies, rates = watched(monkeypatch, data, recipe, tmp_path, *wanted)
    assert [any("encoder" in name for name in moved(copy)) for copy in copies] == [False, False, True, True, True, False]  # the last is 0
    peak = [rate for group in rates for of_encoder, rate in group if not of_encoder]
    assert peak[0] < peak[1] > peak[2] < peak[3] > peak[4] > peak[5] == 0
    assert all(encoder == pytest.approx(0.5 * rest) for group in rates for flag, encoder in group if flag for f, rest in group if not f)


@pytest.mark.parametrize("net", [UNet(1, width=2, depth=4, skips=True), ResEncUNet(1, features=(2, 4, 8), blocks=(1, 1, 1), skips=True)])
def test_levels_nearer_the_input_move_less(net):
    segmentation = SegmentationNet(net, 2)
    groups = fitting._groups(segmentation, EncoderPace(layers=0.5))
    assert sum(len(group["params"]) for group in groups) == len(list(segmentation.parameters()))
    factors = {group["factor"] for group in groups if group["of_encoder"]}
    levels = len(net.encoder.channels)
    assert factors == {0.5**i for i in range(levels)}
    name_of = {id(parameter): name for name, parameter in net.encoder.named_parameters()}
    slowest = next(group for group in groups if group["factor"] == min(factors))
    assert any(id(parameter) in name_of for parameter in slowest["params"])
    first = next(iter(net.encoder.parameters()))
    assert any(parameter is first for parameter in slowest["params"])


def test_without_a_pace_all_parameters_are_one_group_in_their_order():
    net = SegmentationNet(UNet(1, width=2, depth=2, skips=True), 2)
    assert all(a is b for a, b in zip(fitting._groups(net, EncoderPace()), net.parameters(), strict=True))


def test_the_encoders_own_warm_up():
    pace = EncoderPace(lr=0.1, warmup=0.2)
    assert [pace.factor(p, frozen=0.3) for p in (0.3, 0.4, 0.5, 1.0)] == pytest.approx([0, 0.05, 0.1, 0.1])


@pytest.mark.parametrize("given", [{"schedule": "sawtooth", "warmup": 0.5}, {"schedule": "sawtooth", "warmup": 0.0}])
def test_a_sawtooth_needs_room_for_two_rises(given):
    with pytest.raises(BadInput, match="rises twice"):
        Optimisation(**given)
    with pytest.raises(BadInput, match="freeze"):
        EncoderPace(freeze=2)


def test_the_next_batch_is_read_ahead_and_none_beyond_the_last():
    read = []
    patches = SimpleNamespace(batch=lambda step: read.append(step) or step)
    current = SimpleNamespace(steps_done=3, optimisation=SimpleNamespace(steps=6), patches=patches)
    assert list(fitting._read_ahead(current)) == [3, 4, 5] == read  # type: ignore[arg-type]


def test_a_fault_of_the_reading_reaches_the_run(monkeypatch, data, recipe, tmp_path):
    from volssl.cases import LabelledPatches

    batch = LabelledPatches.batch

    def broken(self, step):
        if step == 3:
            raise BadInput("the disk is gone")
        return batch(self, step)

    monkeypatch.setattr(LabelledPatches, "batch", broken)
    with pytest.raises(BadInput, match="the disk is gone"):
        run(recipe, data=data, out=tmp_path / "run")
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]
