"""Memory of a training step: by hand for one convolution, and the shipped presets within what they are called after."""

import pytest
import torch

from volssl import recipe as recipes
from volssl.datasets import CaseTable
from volssl.finetune import PARTS
from volssl.memory import training_gb
from volssl.segment import Plan
from volssl.starting import plan_of

SETS = {
    "brats": CaseTable((), {"necrosis": 1, "oedema": 2, "enhancing": 4}, tuple("abcd"), {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}),
    "lits": CaseTable((), {"liver": 1, "tumour": 2}, ("CT",), {"liver": (1, 2), "tumour": (2,)}),
    "luna": CaseTable((), {"nodule": 1}, ("CT",)),
}


def planned(**changes):
    net = {"name": "unet", "arguments": {"in_channels": 1, "width": 4, "depth": 2, "norm": "instance"}}
    return Plan(**({"architecture": net, "labels": {"a": 1}, "channels": ("CT",), "patch_vox": (16, 16, 16)} | changes))


def test_what_is_counted_is_what_a_real_step_keeps():
    """The same hooks around a real step on the CPU, counted independently by address."""
    plan = planned(patch_vox=(32, 32, 32))
    net, seen = plan.network().train(), {}
    mine = {parameter.data_ptr() for parameter in net.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in mine:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = net(torch.rand(2, 1, 32, 32, 32))
        loss = torch.nn.functional.cross_entropy(logits, torch.zeros(2, 32, 32, 32, dtype=torch.long))
    assert loss.requires_grad
    sizes = [storage.nbytes() for storage in seen.values()]
    weights = 20 * sum(parameter.numel() for parameter in net.parameters())
    counted = (sum(sizes) + 2 * max(sizes) + weights) / 1e9
    estimate = training_gb(plan, batch_size=2, half=False)
    assert counted <= estimate < 1.35 * counted  # the Dice's tensors of two classes come on top


def test_it_grows_with_patch_batch_and_bytes():
    one = training_gb(planned(), batch_size=1, half=False)
    assert training_gb(planned(), batch_size=4, half=False) > 2 * one
    assert training_gb(planned(patch_vox=(32, 32, 32)), batch_size=1, half=False) > 4 * one
    assert training_gb(planned(patch_vox=(32, 32, 32)), batch_size=2, half=True) < training_gb(
        planned(patch_vox=(32, 32, 32)), batch_size=2, half=False
    )


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("preset", ["8gb", "16gb", "24gb", "80gb"])
def test_presets_leave_a_third_of_what_they_are_called_after(name, preset):
    made = recipes.parse(recipes.load(name, [f"preset={preset}"], verb="finetune"), PARTS, name)
    estimate = training_gb(plan_of(made, SETS[name]), batch_size=made["sampling"].batch_size, half=True)
    assert estimate < 0.67 * int(preset.removesuffix("gb"))


def test_an_override_stands_above_a_preset_and_unknown_ones_are_named():
    values = recipes.load("lits", ["sampling.batch_size=7", "preset=80gb"], verb="finetune")
    assert values["sampling"]["batch_size"] == 7 and values["sampling"]["patch_vox"] == [160, 160, 128]
    assert "preset" not in values and "presets" not in values
    assert recipes.load("lits", verb="finetune")["sampling"]["patch_vox"] == [128, 128, 128]
    with pytest.raises(recipes.BadInput, match=r"8gb, 16gb, 24gb, 80gb; found '12gb'"):
        recipes.load("lits", ["preset=12gb"], verb="finetune")
