"""Shares written part by part lie on the image's own grid, whatever its axes."""

import numpy as np
import pytest
import torch

from volssl.archive import read_image
from volssl.shares import ShareFiles
from volssl.volume import Grid, Volume

# Array axes along world z, x (reversed) and y: parts of the grid turned to RAS+ are no parts in the file's order.
AFFINE = np.array([[0, -1.0, 0, 9], [0, 0, 2.0, -7], [1.5, 0, 0, 3], [0, 0, 0, 1]])


@pytest.mark.parametrize("affine", [AFFINE, np.eye(4)])
def test_parts_in_any_order_make_the_whole(tmp_path, affine):
    grid = Grid((7, 6, 5), affine)
    turned = grid.reoriented("RAS")
    shares = torch.rand(3, *turned.shape_vox, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    with ShareFiles(tmp_path / "case", grid, {"liver": 1, "tumour": 2}) as files:
        for part in (slice(3, None), slice(0, 2), slice(2, 3)):
            files.keep((slice(None), part, slice(None)), shares[:, :, part])
        files.write()
    assert sorted(path.name for path in (tmp_path / "case").iterdir()) == ["liver.nii.gz", "tumour.nii.gz"]
    for name, channel in (("liver", 1), ("tumour", 2)):
        read = read_image(tmp_path / "case" / f"{name}.nii.gz")
        assert read.grid.almost_equal(grid)
        expected = Volume(shares[channel].clamp(0, 1).numpy()[None], turned).reoriented(grid.orientation)
        np.testing.assert_allclose(read.array_CXYZ, expected.array_CXYZ, atol=0.5 / 32767 + 1e-6)


def test_nothing_is_left_of_a_case_that_failed(tmp_path):
    with pytest.raises(RuntimeError), ShareFiles(tmp_path / "case", Grid((7, 6, 5), AFFINE), {"liver": 1}):
        raise RuntimeError
    assert not list((tmp_path / "case").iterdir())


def test_a_full_disk_is_told_before_any_share_is_made(small_disk):
    with pytest.raises(OSError, match="No space left"), ShareFiles(small_disk("64k") / "case", Grid((50, 50, 50), np.eye(4)), {"liver": 1}):
        pass
