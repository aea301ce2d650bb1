"""Find scans on disk; read and write one.

Formats: DICOM series, NIfTI (.nii, .nii.gz, .hdr/.img pairs), MetaImage (.mha, .mhd), NRRD (.nrrd, .nhdr).
Everything leaves here in world RAS+ (LPS of DICOM and ITK is turned in `stacks` and `formats` and nowhere else), with the voxel order of
the file, or of the box that a mended series is drawn on.
"""

from __future__ import annotations

import gzip
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from volssl.dicom import VOLUME_MODALITIES, Slice, Unreadable, frames_of, header, is_dicom
from volssl.files import BadInput, atomic
from volssl.formats import META, NIFTI, NRRD, read_file
from volssl.pixels import read_series
from volssl.stacks import Limits
from volssl.volume import Grid, Volume

IMAGES = NIFTI + META + NRRD
COMPANIONS = (".raw", ".zraw", ".raw.gz", ".img", ".img.gz")  # pixels of a header file that is found by itself
ZIPPED = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".dcm.gz", ".7z", ".rar")
UNSUPPORTED = (".mgz", ".mgh", ".mnc", ".par", ".rec", ".brik", ".head", ".dcm", ".ima", ".nii.bz2", ".nii.zst", *ZIPPED)
IGNORED = {"companion", "not_an_image"}
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

    Args: kind: "dicom" or "file". files: of a stack in the order of its slices, or the one image file. part: of a multi-frame file the
        frames in order, of a 4D file the one index along its last axis; () is all there is. repairs: codes of what reading has to mend,
        and may; anything else that is wrong is an error. limits: what the stack was held to.
    """

    kind: str
    files: tuple[Path, ...]
    part: tuple[int, ...] = ()
    repairs: tuple[str, ...] = ()
    limits: Limits = Limits()

    def as_json(self) -> dict[str, Any]:
        """For private/sources.jsonl: plain values."""
        values = {"kind": self.kind, "files": list(map(str, self.files)), "part": list(self.part), "repairs": list(self.repairs)}
        return values | ({"limits": asdict(self.limits)} if self.limits != Limits() else {})

    @classmethod
    def of(cls, values: dict[str, Any]) -> Source:
        """From such values. Raises: KeyError, TypeError: not such values."""
        files = tuple(map(Path, values["files"]))
        return cls(values["kind"], files, tuple(values["part"]), tuple(values["repairs"]), Limits(**values.get("limits", {})))


@dataclass(frozen=True)
class Findings:
    """What lies in an archive: scans; files that are no images, with a code; files that should be images and cannot be read."""

    scans: list[Found]
    ignored: dict[Path, str]
    unreadable: dict[Path, str]


def find(paths: Sequence[Path], *, over: Callable[..., Iterable[Any]] = map) -> Findings:
    """Look through folders (at any depth; links to folders are not followed) and files for scans.

    Args: over: a `map`, possibly that of an executor; opens files and parses DICOM headers.
    Raises: BadInput: if a path does not exist.
    """
    ignored: dict[Path, str] = {}
    unreadable: dict[Path, str] = {}
    scans: list[Found] = []
    unopened: list[Path] = []
    for path, kind in walk(paths):
        if kind == "unopened":
            unopened.append(path)
        elif kind == "file":
            scans.append(Found("file", (path,)))
        else:
            (ignored if kind in IGNORED else unreadable)[path] = kind
    series: dict[tuple[str, str, str], list[Slice]] = {}
    for path, answer in zip(unopened, over(header_or_code, unopened), strict=True):
        if isinstance(answer, str):
            (ignored if answer in IGNORED else unreadable)[path] = answer
        else:
            series.setdefault(answer.key, []).append(answer)
    found = [Found("dicom", tuple(one.path for one in slices), tuple(slices)) for slices in series.values()]
    return Findings(found + scans, ignored, unreadable)


def walk(paths: Sequence[Path], *, is_new: Callable[[int, int], bool] | None = None) -> Iterator[tuple[Path, str]]:
    """Every file once, in an order of its own, with "file", "unopened" (ask `header_or_code`), or the code of why it is no scan.

    No file is opened. Folders that cannot be entered come too. Args: is_new: whether a file, by device and number, was not met before.
    Raises: BadInput: if a path does not exist.
    """
    seen: set[tuple[int, int]] = set()

    def first_time(device: int, number: int) -> bool:
        before = len(seen)
        seen.add((device, number))
        return len(seen) > before

    is_new = is_new or first_time
    for path in map(Path, paths):
        if not path.exists():
            raise BadInput(f"archive {path}: must exist; found nothing there")
        for file, trouble in [(path.absolute(), "")] if path.is_file() else _inside(path.absolute()):
            try:
                facts = os.stat(file)  # noqa: PTH116 - a string is faster here, and this is done for every file
                if stat.S_ISREG(facts.st_mode) and not is_new(facts.st_dev, facts.st_ino):
                    continue  # a link to it, or a second look at its folder
                kind = _kind(file, facts)
            except PermissionError:
                kind = "no_permission"
            except OSError:
                kind = "missing"
            yield file, trouble or kind


def _inside(folder: Path) -> Iterator[tuple[Path, str]]:
    troubles: list[tuple[Path, str]] = []

    def trouble(error: OSError) -> None:
        code = "no_permission" if isinstance(error, PermissionError) else "unreadable_folder"
        troubles.append((Path(error.filename or folder), code))

    for at, dirs, names in os.walk(folder, onerror=trouble):
        dirs.sort()  # so that nothing depends on the file system's order
        yield from ((Path(at, name), "") for name in sorted(names))
        yield from troubles
        troubles.clear()
    yield from troubles


def _kind(path: Path, facts: os.stat_result) -> str:
    if not stat.S_ISREG(facts.st_mode):
        return "not_an_image"  # a pipe, a socket: nothing to open
    suffix = _suffix(path)
    if facts.st_size == 0:
        return "empty_file" if suffix in IMAGES + UNSUPPORTED else "not_an_image"
    if suffix in IMAGES:
        return "file" if os.access(path, os.R_OK) else "no_permission"
    return "unopened"


def _kind_inside(path: Path) -> str:
    try:
        if is_dicom(path):
            return "dicom"
    except PermissionError:
        return "no_permission"
    except OSError:
        return "missing"
    suffix = _suffix(path)
    if suffix in COMPANIONS:
        return "companion"
    if suffix in ZIPPED:
        return "packed_archive"
    return "unsupported_format" if suffix in UNSUPPORTED else "not_an_image"


def _suffix(path: Path) -> str:
    both = "".join(path.suffixes[-2:]).lower()
    return both if both in IMAGES + COMPANIONS + UNSUPPORTED else path.suffix.lower()


def header_or_code(path: Path) -> Slice | str:
    """The header of a DICOM file, or the code of why it has none: what it is instead, or what is wrong with it."""
    if (kind := _kind_inside(path)) != "dicom":
        return kind
    try:
        return header(path)
    except Unreadable as error:
        return error.code


def placed(one: Slice) -> Slice:
    """The one frame of an enhanced file, which says only in its functional groups where it lies; any other slice as it is."""
    if (one.position and one.axes) or one.frames > 1 or one.modality not in VOLUME_MODALITIES or "not_an_image" in one.faults:
        return one
    try:
        return frames_of(one)[0]
    except Unreadable:
        return one


def read(found: Found) -> Volume:
    """Read a scan that `find` found. Raises: Unreadable."""
    return read_files(found.files)


def read_source(source: Source) -> Volume:
    """Read the scan that an index names, mended as its `repairs` say. Raises: Unreadable: with a `code`."""
    if source.kind == "file":
        volume = read_files(source.files)
        if not source.part:
            return volume
        (number,) = source.part
        if number >= len(volume.array_CXYZ):
            raise Unreadable("truncated", f"{source.files[0]}: must hold volume {number}; found {len(volume.array_CXYZ)}")
        return Volume(volume.array_CXYZ[number : number + 1], volume.grid)
    return _checked(read_series(_slices(source), limits=source.limits, repairs=source.repairs), source.files[0])


def _slices(source: Source) -> list[Slice]:
    if not source.part:
        return [header(path) for path in source.files]
    frames = {path: frames_of(header(path)) for path in dict.fromkeys(source.files)}
    files = source.files * len(source.part) if len(source.files) == 1 else source.files
    try:
        return [frames[path][number] for path, number in zip(files, source.part, strict=True)]
    except IndexError:
        raise Unreadable("truncated", f"{files[0]}: must hold {len(source.part)} frames; found fewer") from None


def read_files(files: Sequence[Path]) -> Volume:
    """Read the files of one DICOM series, or one image file, afresh. Raises: Unreadable: with a `code`."""
    if gone := [path for path in files if not path.exists()]:
        raise Unreadable("missing", f"{gone[0]}: must exist; found nothing there")
    if len(files) == 1 and _suffix(files[0]) in IMAGES:
        volume = read_file(files[0])
    else:
        volume = _read_slices([header(path) for path in files])
    return _checked(volume, files[0])


def _read_slices(slices: Sequence[Slice]) -> Volume:
    if len(slices) == 1 and slices[0].frames > 1:
        return read_series(frames_of(slices[0]), repairs=("read_frames",))
    slices = [placed(one) for one in slices]
    return read_series(slices, repairs=("read_frames",) if slices[0].frame >= 0 else ())


def read_image(path: Path) -> Volume:
    """Read one image: a file of any known format, a folder with one DICOM series, or one DICOM file, which stands for its series.

    Returns: the volume with the voxel order of the file; channels first (a fourth axis of NIfTI becomes the channels).
    Raises: BadInput: not there, not an image, truncated, not finite, sheared, or a broken series.
    """
    path = Path(path)
    if not path.exists():
        raise Unreadable("missing", f"{path}: must exist; found nothing there")
    if path.is_file() and _suffix(path) in IMAGES:
        return read_files([path])
    folder = path if path.is_dir() else path.parent
    if path.is_file() and not is_dicom(path):
        raise Unreadable("not_an_image", f"{path}: must be DICOM or one of {', '.join(IMAGES)}; found another kind of file")
    slices = [header(file) for file in sorted(folder.iterdir()) if file.is_file() and _kind_inside(file) == "dicom"]
    if path.is_file():
        slices = [one for one in slices if one.key == header(path).key]
    keys = {one.key for one in slices if "not_an_image" not in one.faults}
    if len(keys) != 1:
        raise Unreadable("not_one_series", f"{path}: must hold one DICOM series; found {len(keys)}; name a file of the one meant")
    return _checked(_read_slices([one for one in slices if one.key in keys]), path)


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
    import nibabel  # takes half of the time in which a process of ours starts, and most need it not

    image = nibabel.Nifti1Image(np.asarray(array_XYZ, dtype=dtype), grid.affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(grid.affine, code=1)
    image.set_sform(grid.affine, code=1)
    with atomic(path) as temporary:
        nibabel.save(image, temporary)


def write_scaled_nifti(path: Path, array_XYZ: np.ndarray, grid: Grid, *, slope: float) -> None:
    """Write whole numbers that stand for `slope` times themselves as .nii.gz, atomically, plane by plane: the array may lie on disk."""
    assert array_XYZ.shape == grid.shape_vox, (array_XYZ.shape, grid.shape_vox)
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_dtype(array_XYZ.dtype)
    header.set_data_shape(array_XYZ.shape)
    header.set_xyzt_units("mm")
    header.set_qform(grid.affine, code=1)
    header.set_sform(grid.affine, code=1)
    header.set_slope_inter(slope, 0)
    header["magic"], header["vox_offset"] = b"n+1", 352
    with atomic(path) as temporary, gzip.open(temporary, "wb", compresslevel=3) as stream:
        stream.write(header.binaryblock + bytes(4))  # no extensions
        for plane_XY in np.moveaxis(array_XYZ, 2, 0):
            stream.write(plane_XY.tobytes(order="F"))
