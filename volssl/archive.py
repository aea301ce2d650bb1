"""Find scans on disk; read and write one. The only door, with `dicom`, to nibabel, SimpleITK's readers and pydicom.

Formats: DICOM series, NIfTI (.nii, .nii.gz, .hdr/.img pairs), MetaImage (.mha, .mhd), NRRD (.nrrd, .nhdr).
Everything leaves here in world RAS+ (LPS of DICOM and ITK is turned here and nowhere else), with the voxel order of the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from volssl.dicom import LPS_TO_RAS, Slice, Unreadable, header, is_dicom, quiet, read_series
from volssl.files import BadInput, atomic
from volssl.volume import Grid, Volume

NIFTI = (".nii", ".nii.gz", ".hdr")
ITK = (".mha", ".mhd", ".nrrd", ".nhdr")
COMPANIONS = (".raw", ".zraw", ".raw.gz", ".img", ".img.gz")  # pixels of a header file that is found by itself
UNSUPPORTED = (".zip", ".mgz", ".mgh", ".mnc", ".par", ".rec", ".brik", ".head", ".dcm", ".ima", ".nii.bz2", ".nii.zst")
SHEAR = 1e-3  # largest |cosine| between two array axes: a sheared grid is no box of voxels


@dataclass(frozen=True)
class Found:
    """One scan on disk: the files of a DICOM series with their headers, or one image file."""

    kind: str  # "dicom" or "file"
    files: tuple[Path, ...]
    slices: tuple[Slice, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Source:
    """How the voxels of one scan are read again: `read_source` takes it alone, from any process.

    Args: kind: "dicom" or "file". files: of a series in the order of the slices, or the one image file. part: of a multi-frame file the
        frames in order, of a 4D file the one index along its last axis; () is all there is. repairs: codes of what reading has to mend,
        and may; anything else that is wrong is an error.
    """

    kind: str
    files: tuple[Path, ...]
    part: tuple[int, ...] = ()
    repairs: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For private/sources.jsonl: plain values."""
        return {"kind": self.kind, "files": list(map(str, self.files)), "part": list(self.part), "repairs": list(self.repairs)}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Source:
        """From such values. Raises: KeyError, TypeError: not such values."""
        return cls(values["kind"], tuple(map(Path, values["files"])), tuple(values["part"]), tuple(values["repairs"]))


@dataclass(frozen=True)
class Findings:
    """What lies in an archive: scans; files that are no images, with a code; files that should be images and cannot be read."""

    scans: list[Found]
    ignored: dict[Path, str]
    unreadable: dict[Path, str]


def find(paths: Sequence[Path], *, over: Callable[..., Iterable[Any]] = map) -> Findings:
    """Look through folders (at any depth; links to folders are not followed) and files for scans.

    Args: over: a `map`, possibly that of an executor; parses DICOM headers.
    Raises: BadInput: if a path does not exist.
    """
    ignored: dict[Path, str] = {}
    unreadable: dict[Path, str] = {}
    scans: list[Found] = []
    dicom: list[Path] = []
    for path in _files(paths):
        kind = _kind(path)
        if kind == "dicom":
            dicom.append(path)
        elif kind == "file":
            scans.append(Found("file", (path,)))
        else:
            (ignored if kind in ("companion", "not_an_image") else unreadable)[path] = kind
    series: dict[tuple[str, str, str], list[Slice]] = {}
    for path, answer in zip(dicom, over(_header_or_code, dicom), strict=True):
        if isinstance(answer, str):
            unreadable[path] = answer
        else:
            series.setdefault(answer.key, []).append(answer)
    found = [Found("dicom", tuple(one.path for one in slices), tuple(slices)) for slices in series.values()]
    return Findings(found + scans, ignored, unreadable)


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    seen: set[Path] = set()
    for path in map(Path, paths):
        if not path.exists():
            raise BadInput(f"archive {path}: must exist; found nothing there")
        inside = [path] if path.is_file() else (Path(at) / name for at, dirs, names in _walk(path) for name in names)
        for file in inside:
            real = file.resolve() if file.is_symlink() else file.absolute()
            if real not in seen:
                seen.add(real)
                yield file.absolute()


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    for at, dirs, names in os.walk(folder):
        dirs.sort()  # so that nothing depends on the file system's order
        yield at, dirs, sorted(names)


def _kind(path: Path) -> str:
    # "dicom", "file", or the code of why it is neither.
    try:
        if path.stat().st_size == 0:
            return "empty_file" if _suffix(path) in NIFTI + ITK else "not_an_image"
        if _suffix(path) in NIFTI + ITK:
            return "file" if os.access(path, os.R_OK) else "no_permission"
        if path.is_file() and is_dicom(path):
            return "dicom"
    except PermissionError:
        return "no_permission"
    except OSError:
        return "missing"
    if _suffix(path) in COMPANIONS:
        return "companion"
    return "unsupported_format" if _suffix(path) in UNSUPPORTED else "not_an_image"


def _suffix(path: Path) -> str:
    both = "".join(path.suffixes[-2:]).lower()
    return both if both in NIFTI + COMPANIONS + UNSUPPORTED else path.suffix.lower()


def _header_or_code(path: Path) -> Slice | str:
    try:
        return header(path)
    except Unreadable as error:
        return error.code


def read(found: Found) -> Volume:
    """Read a scan that `find` found. Raises: Unreadable."""
    return read_files(found.files)


def read_source(source: Source) -> Volume:
    """Read the scan that an index names, mended as its `repairs` say. Raises: Unreadable: with a `code`."""
    volume = read_files(source.files)
    if source.kind == "file" and source.part:
        (channel,) = source.part
        volume = Volume(volume.array_CXYZ[channel : channel + 1], volume.grid)
    return volume


def read_files(files: Sequence[Path]) -> Volume:
    """Read the files of one DICOM series, or one image file, afresh. Raises: Unreadable: with a `code`."""
    if gone := [path for path in files if not path.exists()]:
        raise Unreadable("missing", f"{gone[0]}: must exist; found nothing there")
    if len(files) == 1 and _suffix(files[0]) in NIFTI + ITK:
        volume = _read_file(files[0])
    else:
        volume = read_series([header(path) for path in files])
    return _checked(volume, files[0])


def read_image(path: Path) -> Volume:
    """Read one image: a file of any known format, a folder with one DICOM series, or one DICOM file, which stands for its series.

    Returns: the volume with the voxel order of the file; channels first (a fourth axis of NIfTI becomes the channels).
    Raises: BadInput: not there, not an image, truncated, not finite, sheared, or a broken series.
    """
    path = Path(path)
    if not path.exists():
        raise Unreadable("missing", f"{path}: must exist; found nothing there")
    if path.is_file() and _suffix(path) in NIFTI + ITK:
        return read_files([path])
    folder = path if path.is_dir() else path.parent
    if path.is_file() and not is_dicom(path):
        raise Unreadable("not_an_image", f"{path}: must be DICOM or one of {', '.join(NIFTI + ITK)}; found another kind of file")
    slices = [header(file) for file in sorted(folder.iterdir()) if file.is_file() and _kind(file) == "dicom"]
    if path.is_file():
        slices = [one for one in slices if one.key == header(path).key]
    keys = {one.key for one in slices if "not_an_image" not in one.faults}
    if len(keys) != 1:
        raise Unreadable("not_one_series", f"{path}: must hold one DICOM series; found {len(keys)}; name a file of the one meant")
    return _checked(read_series([one for one in slices if one.key in keys]), path)


def read_label(path: Path) -> Volume:
    """Read a label map; whole numbers stored as floats are accepted. Raises: BadInput: as `read_image`, or not whole numbers."""
    volume = read_image(path)
    array = volume.array_CXYZ
    if array.shape[0] != 1:
        raise BadInput(f"label {path}: must have one channel; found {array.shape[0]}")
    if not np.issubdtype(array.dtype, np.integer):
        whole = array.astype(np.int32)
        if not np.array_equal(whole, array):
            raise BadInput(f"label {path}: must hold whole numbers; found fractions; is it an image?")
        array = whole
    return Volume(array, volume.grid)


def _read_file(path: Path) -> Volume:
    try:
        return _read_nifti(path) if _suffix(path) in NIFTI else _read_itk(path)
    except (Unreadable, MemoryError):
        raise
    except PermissionError:
        raise Unreadable("no_permission", f"{path}: must be readable; permission denied") from None
    except EOFError:
        raise Unreadable("truncated", f"{path}: ends before its last voxel") from None
    except Exception as error:  # a parser on foreign bytes may raise anything
        raise Unreadable("undecodable", f"{path}: cannot be decoded ({type(error).__name__}); is it whole?") from None


def _read_nifti(path: Path) -> Volume:
    image: Any = nibabel.load(path, mmap=False)
    if not isinstance(image, nibabel.Nifti1Pair) or not (image.header["qform_code"] or image.header["sform_code"]):
        raise Unreadable("no_orientation", f"{path}: must have a q-form or an s-form; without, left and right are not known")
    affine, array = np.asarray(image.affine), np.asanyarray(image.dataobj)
    if array.dtype.fields:
        raise Unreadable("rgb", f"{path}: must hold one number per voxel; found colours")
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (3, 4):
        raise Unreadable("not_3d", f"{path}: must have three axes, or four with channels last; found {array.ndim}")
    array_CXYZ = array[None] if array.ndim == 3 else np.moveaxis(array, -1, 0)
    x, y, z = array_CXYZ.shape[1:]
    return Volume(_native(array_CXYZ), Grid((x, y, z), affine))


def _read_itk(path: Path) -> Volume:
    with quiet():
        image = sitk.ReadImage(str(path))
    if image.GetDimension() != 3:
        raise Unreadable("not_3d", f"{path}: must have three axes; found {image.GetDimension()}")
    if _suffix(path) in (".nrrd", ".nhdr") and not image.HasMetaDataKey("NRRD_space"):
        raise Unreadable("no_orientation", f"{path}: must name its space; without, left and right are not known")
    array = sitk.GetArrayFromImage(image)
    array_CXYZ = array.transpose(2, 1, 0)[None] if array.ndim == 3 else array.transpose(3, 2, 1, 0)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    x, y, z = image.GetSize()
    return Volume(_native(array_CXYZ), Grid((x, y, z), LPS_TO_RAS @ affine))


def _native(array: np.ndarray) -> np.ndarray:
    # Scaled NIfTI comes as float64, which nobody needs; whole numbers up to 2^24 stay exact in float32.
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _checked(volume: Volume, path: Path) -> Volume:
    array = volume.array_CXYZ
    if array.dtype.kind not in "iuf":
        raise Unreadable("not_numbers", f"{path}: must hold real numbers; found {array.dtype}")
    if array.dtype.kind == "f" and (bad := array.size - int(np.count_nonzero(np.isfinite(array)))):
        raise Unreadable("not_finite", f"{path}: must hold finite numbers; found {bad} of {array.size} voxels NaN or infinite")
    axes = volume.grid.affine[:3, :3] / np.array(volume.grid.spacing_mm)
    if np.abs(axes.T @ axes - np.eye(3)).max() > SHEAR:
        raise Unreadable("sheared", f"{path}: axes must stand at right angles; found a sheared affine; resample it first")
    return volume


def write_nifti(path: Path, array_XYZ: np.ndarray, grid: Grid, dtype: Any) -> None:
    """Write one array of the grid's shape as .nii or .nii.gz, atomically, with q-form and s-form and no free text."""
    assert array_XYZ.shape == grid.shape_vox, (array_XYZ.shape, grid.shape_vox)
    image = nibabel.Nifti1Image(np.asarray(array_XYZ, dtype=dtype), grid.affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(grid.affine, code=1)
    image.set_sform(grid.affine, code=1)
    with atomic(path) as temporary:
        nibabel.save(image, temporary)
