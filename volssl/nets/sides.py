"""Which sizes of input a backbone can take."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from volssl.files import BadInput

Triple = tuple[int, int, int]


def triple(value: int | Sequence[int]) -> Triple:
    """A number for all three axes, or one for each."""
    x, y, z = (value, value, value) if isinstance(value, int) else value
    return int(x), int(y), int(z)


def side_fault(size_vox: Sequence[int], stride: Triple, *, norm: str, batch: int | None = None) -> str | None:
    """What keeps an input of `size_vox` from passing a backbone, or None.

    Args: stride: input voxels per voxel of the coarsest map, by axis. norm: of the coarsest map; instance normalisation of a single voxel
        has no variance, nor has batch normalisation of a single voxel of a single sample. batch: samples in training, where known.
    """
    told = stride[0] if len(set(stride)) == 1 else stride
    if any(side < 1 or side % step for side, step in zip(size_vox, stride, strict=True)):
        return f"every side must be a multiple of the net's stride {told}; found {tuple(size_vox)}"
    one_voxel = tuple(size_vox) == stride
    if one_voxel and (norm == "instance" or (norm == "batch" and batch == 1)):
        return (
            f"{tuple(size_vox)} leaves one voxel at the net's stride {told}, which {norm} normalisation cannot take; "
            "choose larger sides, fewer levels or another norm"
        )
    return None


def check_sides(x_BCXYZ: Tensor, stride: Triple, *, norm: str) -> None:
    """Raises: BadInput: if the input's sides do not fit the backbone."""
    if (fault := side_fault(x_BCXYZ.shape[2:], stride, norm=norm)) is not None:
        raise BadInput(f"input of the net: {fault}")
