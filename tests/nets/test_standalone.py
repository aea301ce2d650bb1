import numpy as np
import pytest
import torch

from volssl.augment.intensity import zscore
from volssl.nets.standalone import Decide, EncoderNetwork, Normalise, SegmentationNetwork, Shares, cases, weighted
from volssl.preparation import Preparation
from volssl.volume import Grid, Volume

ARGUMENTS = {"width": 2, "depth": 2, "norm": "instance"}


def test_each_patch_is_normalised_as_in_volssl():
    plain, scored = EncoderNetwork("unet", ARGUMENTS), EncoderNetwork("unet", ARGUMENTS, zscore=True)
    scored.load_state_dict(plain.state_dict())
    x = 3 + 5 * torch.randn(2, 1, 8, 8, 8)
    torch.testing.assert_close(scored(x), plain(zscore(x)))
    assert scored(x).shape == (2, plain.encoder.channels[-1], 4, 4, 4)


@pytest.mark.parametrize("how", ["window", "percentile", "zscore"])
@pytest.mark.parametrize("nonzero", [False, True])
def test_images_are_normalised_as_in_volssl(how, nonzero):
    rng = np.random.default_rng(0)
    array = rng.normal(100, 300, (2, 9, 8, 7)).astype(np.float32) * (rng.random((2, 9, 8, 7)) < 0.7)
    preparation = Preparation(normalisation=how, window=(-200, 400), nonzero=nonzero)
    wanted = preparation.image(Volume(array, Grid((9, 8, 7), np.eye(4)))).array_CXYZ
    given = torch.from_numpy(array.copy())
    found = Normalise(how, window=(-200, 400), nonzero=nonzero)(given)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)
    np.testing.assert_array_equal(given.numpy(), array)


@pytest.mark.parametrize("regions", [False, True])
def test_shares_are_the_mean_over_the_mirror_images(regions):
    network = SegmentationNetwork("unet", ARGUMENTS, out_channels=3).eval()
    x = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        found = Shares(network, regions=regions, flips=(True, False, True))(x)
        wanted = []
        for axes in ((), (2,), (4,), (2, 4)):
            logits = network(x.flip(axes))
            wanted.append((logits.sigmoid() if regions else logits.softmax(1)).flip(axes))
    torch.testing.assert_close(found, torch.stack(wanted).mean(0))


def test_labels_of_classes_and_of_regions():
    shares = torch.tensor([[0.2, 0.1, 0.6], [0.7, 0.6, 0.4], [0.1, 0.3, 0.0]])[:, :, None, None]
    assert Decide(values=[0, 5, 9])(shares).flatten().tolist() == [5, 5, 0]
    nested = Decide(values=[0, 1, 2, 4], regions={"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)})
    assert nested(torch.tensor([[0.9, 0.9, 0.2], [0.1, 0.9, 0.2], [0.0, 0.5, 0.1]])[:, :, None, None]).flatten().tolist() == [2, 4, 0]


def test_weights_are_loaded_all_or_none(tmp_path):
    network = EncoderNetwork("unet", ARGUMENTS)
    torch.save(network.state_dict(), tmp_path / "whole.pt")
    torch.save(dict(list(network.state_dict().items())[1:]), tmp_path / "part.pt")
    assert not weighted(EncoderNetwork("unet", ARGUMENTS), str(tmp_path / "whole.pt")).training
    with pytest.raises(RuntimeError, match="Missing key"):
        weighted(EncoderNetwork("unet", ARGUMENTS), str(tmp_path / "part.pt"))


def test_files_of_several_channels_are_one_case(tmp_path):
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    assert [len(case["image"]) for case in cases(str(tmp_path), 2)] == [2, 2]
    assert len(cases(str(tmp_path), 1)) == 4
