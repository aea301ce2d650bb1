"""Views of a run: a function of boxes and draws alone, whoever makes them."""

import copy
import pickle

import pytest
import torch

from volssl.augment.crops import PairCrops
from volssl.methods.method import without_weights
from volssl.methods.pcrlv2 import PCRLv2
from volssl.nets.unet import UNet
from volssl.running import ViewMaker

BOX = (96, 96, 80)


def method() -> PCRLv2:
    crops = PairCrops(((80, 80, 64), (90, 72, 72)), locals=2, local_sizes_vox=((24, 24, 24),))
    return PCRLv2(UNet(width=2, depth=2), crops=crops, out_vox=((64, 64, 32), (16, 16, 16)))


def maker(made: PCRLv2, seed: int = 0) -> ViewMaker:
    return ViewMaker(without_weights(made), (-1000.0, 1000.0), (1.0, 1.0, 1.0), seed, "", 0)


@pytest.fixture(scope="module")
def boxes():
    return torch.randint(-1000, 1000, (2, 1, *BOX), dtype=torch.int16, generator=torch.Generator().manual_seed(0))


def tensors(views):
    return [views.one.seen, views.one.target, views.other.seen, views.other.target, views.locals]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_the_number_of_threads_does_not_change_a_bit_and_is_put_back(boxes):
    before = torch.get_num_threads()
    made = {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made[threads] = [maker(method())(boxes, index) for index in range(3)]
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3):
        assert all(equal(a, b) for a, b in zip(made[1], made[threads], strict=True))


def test_views_need_no_weights_and_the_light_copy_leaves_the_method_whole(boxes):
    made = method()
    before = copy.deepcopy(made.state_dict())
    light = without_weights(made)
    assert not list(light.parameters()) and not list(light.buffers())
    with pytest.raises(AttributeError, match="net"):
        _ = light.net
    assert len(pickle.dumps(maker(made))) < 20_000
    first = maker(made)(boxes, 0)
    assert made.state_dict().keys() == before.keys() and made.net is not None
    assert not equal(first, maker(made)(boxes, 1)) and not equal(first, maker(made, seed=1)(boxes, 0))


def test_a_maker_sent_to_another_process_makes_the_same(boxes):
    made = method()
    made.compile_views()  # what is compiled is not sent; it is compiled there when it is first used
    sent = pickle.loads(pickle.dumps(maker(made)))
    assert type(sent.method.sampler) is type(made.sampler) and sent.method.sampler is not made.sampler
    sent.method.sampler = made.sampler = None
    assert equal(sent(boxes, 4), maker(made)(boxes, 4))
