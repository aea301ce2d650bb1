"""Pixels of DICOM slices -> one volume, mended where that was asked for.

Plain pixels are read as bytes; compressed ones are decoded by SimpleITK, file by file, in our order.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import UID, SecondaryCaptureImageStorage

from volssl.dicom import LPS_TO_RAS, Slice, Unreadable, WithinFile
from volssl.stacks import REPAIRS, Limits, Stack, measure
from volssl.volume import Grid, Volume

# Says what a series is, not that it cannot be read.
READABLE = {"localiser", "derived", "secondary", "computed", "burned_in_annotation", "too_few_slices"}
LARGEST = 1 << 34  # bytes of one decoded scan
BOMB = 1 << 26  # from here on, one compressed slice of more than BOMB_RATIO times its size is refused
BOMB_RATIO = 1000


def read_stack(stack: Stack, *, repairs: Sequence[str] = ()) -> Volume:
    """Decode one stack. Values are rescaled (HU in CT): int16 if they fit and are whole, else float32.

    Raises: Unreadable: something is wrong that is not among `repairs`, or a file cannot be decoded.
    """
    where = f"{stack.slices[0].path.parent}: series of {len(stack.slices)} DICOM images"
    blocking = [code for code in stack.reasons if code not in READABLE and REPAIRS.get(code) not in repairs]
    if blocking or stack.grid is None:
        codes = ", ".join(blocking) or "no grid"
        raise Unreadable((blocking or ["no_geometry"])[0], f"{where}: must be one even stack of slices; found {codes}; see `volssl index`")
    order = stack.slices
    rows, columns = order[0].shape
    low, high = min(one.pixels.values[0] for one in order), max(one.pixels.values[1] for one in order)
    small = all(one.pixels.whole for one in order) and low >= -(2**15) and high < 2**15
    if (needed := rows * columns * len(order) * 4) > LARGEST:
        raise Unreadable("too_large", f"{where}: must take at most {LARGEST} bytes; found {needed}")
    array_ZYX = np.empty((len(order), rows, columns), dtype=np.int16 if small else np.float32)
    with quiet():
        for plane, one in zip(array_ZYX, order, strict=True):
            _read_into(plane, one)
    if not set(stack.reasons) & {"gantry_tilt", "uneven_gap", "shifted_slice"}:
        return Volume(array_ZYX.transpose(2, 1, 0)[None], stack.grid)
    return Volume(_upright(array_ZYX, order, stack.grid).transpose(2, 1, 0)[None], stack.grid)


def read_series(slices: Sequence[Slice], *, limits: Limits = Limits(min_slices=2), repairs: Sequence[str] = ()) -> Volume:
    """Sort and decode slices that are one volume. Raises: Unreadable: as `read_stack`."""
    faults = {code for one in slices for code in one.faults}
    first = slices[0]
    if {"not_an_image", "no_geometry"} & faults:
        return read_stack(Stack(tuple(slices), None, tuple(sorted(faults))))
    if any(len(one.position) != 3 or len(one.axes) != 6 or len(one.spacing) != 2 or min(one.spacing) < 1e-3 for one in slices):
        return read_stack(Stack(tuple(slices), None, ("no_geometry",)))
    for code, odd in {
        "mixed_size": any(one.shape != first.shape for one in slices),
        "mixed_orientation": np.abs(np.array([one.axes for one in slices]) - first.axes).max() > limits.direction,
        "mixed_spacing": not np.allclose([one.spacing for one in slices], first.spacing, rtol=1e-3, atol=0),
    }.items():
        if odd:
            return read_stack(Stack(tuple(slices), None, (code,)))
    order, grid, reasons = measure(slices, limits)
    if any(one.frame >= 0 for one in slices):
        faults.add("multi_frame")
    return read_stack(Stack(tuple(order), grid, tuple(sorted(faults | set(reasons)))), repairs=repairs)


def same_pixels(one: Slice, two: Slice) -> bool:
    """Whether two slices hold equal values; one that cannot be decoded equals none."""
    try:
        with quiet():
            return np.array_equal(read_slice(one), read_slice(two))
    except Unreadable:
        return False


def read_slice(one: Slice) -> np.ndarray:
    """Rescaled values of one slice or frame, (rows, columns); whole numbers stay whole. Raises: Unreadable."""
    try:
        stored = _plain(one) if one.pixels.plain else _decoded(one)
    except Unreadable:
        raise
    except PermissionError:
        raise Unreadable("no_permission", f"{one.path}: must be readable; permission denied") from None
    except FileNotFoundError:
        raise Unreadable("missing", f"{one.path}: must exist; found nothing there") from None
    except (RuntimeError, ValueError, OSError) as error:  # their texts name files
        raise Unreadable("undecodable", f"{one.path}: pixels cannot be decoded ({type(error).__name__})") from None
    if stored.shape != one.shape:
        raise Unreadable("undecodable", f"{one.path}: must decode to {one.shape} pixels; found {stored.shape}")
    return stored


def _read_into(plane: np.ndarray, one: Slice) -> None:
    # As read_slice, without an array in between where stored values and the shift fit int16.
    pixels = one.pixels
    low, high = pixels.values
    if not (plane.dtype == np.int16 and pixels.plain and pixels.allocated == 16 and pixels.slope == 1.0 and max(-low, high) < 2**15):
        plane[:] = read_slice(one)
        return
    stored = read_slice(replace(one, pixels=replace(pixels, slope=1.0, intercept=0.0)))
    # Modulo 2^16 the sum is right whatever the sign of the type, since the result fits.
    np.add(stored.view(np.int16), np.int16(int(pixels.intercept)), out=plane)


def _plain(one: Slice) -> np.ndarray:
    pixels = one.pixels
    count = one.shape[0] * one.shape[1]
    width = pixels.allocated // 8
    handle = os.open(one.path, os.O_RDONLY)
    try:
        if os.fstat(handle).st_size < pixels.offset + count * width * (max(0, one.frame) + 1):
            raise Unreadable("truncated", f"{one.path}: must hold {one.shape} pixels; the file ends before")
        raw = os.pread(handle, count * width, pixels.offset + max(0, one.frame) * count * width)
    finally:
        os.close(handle)
    if len(raw) < count * width:
        raise Unreadable("truncated", f"{one.path}: must hold {one.shape} pixels; the file ends before")
    stored = np.frombuffer(raw, dtype=f"<{'i' if pixels.signed else 'u'}{width}").reshape(one.shape)
    return _rescaled(_within(stored, pixels.stored, pixels.allocated), one)


def _within(stored: np.ndarray, bits: int, allocated: int) -> np.ndarray:
    # Bits above those that count may hold anything: overlays of old scanners, for one.
    if bits >= allocated:
        return stored
    if stored.dtype.kind == "u":
        return stored & stored.dtype.type((1 << bits) - 1)
    return (stored << (allocated - bits)) >> (allocated - bits)


def _rescaled(stored: np.ndarray, one: Slice) -> np.ndarray:
    slope, intercept = one.pixels.slope, one.pixels.intercept
    if not one.pixels.whole:
        return (stored * slope + intercept).astype(np.float32)
    if (slope, intercept) == (1.0, 0.0):
        return stored
    wide = stored.astype(np.int32 if one.pixels.allocated < 32 else np.int64)
    return wide * int(slope) + int(intercept) if slope != 1.0 else wide + int(intercept)


def _decoded(one: Slice) -> np.ndarray:
    declared, stored = one.shape[0] * one.shape[1] * one.pixels.allocated // 8, one.path.stat().st_size
    if declared > BOMB and declared > BOMB_RATIO * stored:
        raise Unreadable("too_large", f"{one.path}: {stored} bytes declare an image of {declared}")
    if one.frame < 0:
        values = _by_itk(one.path)
        return values[0] if values.ndim == 3 and len(values) == 1 else values
    # One frame as a file of its own: so its own rescaling can be applied, and only it is decoded.
    with WithinFile(one.path) as stream:
        data = pydicom.dcmread(stream, force=True)
    frame = get_frame(data.PixelData, one.frame, number_of_frames=one.frames)
    single = pydicom.Dataset()
    single.file_meta = FileMetaDataset()
    single.file_meta.TransferSyntaxUID = UID(one.pixels.syntax)
    single.SOPClassUID = single.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    single.SOPInstanceUID = single.file_meta.MediaStorageSOPInstanceUID = UID("2.25.1")
    for keyword in "SamplesPerPixel PhotometricInterpretation Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation".split():
        setattr(single, keyword, data.get(keyword))
    single.PixelData = encapsulate([frame])
    single["PixelData"].is_undefined_length = True
    with tempfile.TemporaryDirectory() as folder:
        single.save_as(path := Path(folder) / "frame.dcm", enforce_file_format=True)
        values = _by_itk(path)
    return _rescaled(values.reshape(values.shape[-2:]), one)


def _by_itk(path: Path) -> np.ndarray:
    import SimpleITK as sitk  # a fifth of the time in which a process of ours starts, and plain pixels need it not

    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # they hold file names and header text
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def _upright(array_ZYX: np.ndarray, order: Sequence[Slice], grid: Grid) -> np.ndarray:
    # Every slice is moved within its plane to where it belongs, then planes are drawn from the two slices around each.
    lps = LPS_TO_RAS @ grid.affine
    axes_33 = lps[:3, :3].T / np.array(grid.spacing_mm)[:, None]
    places_N3 = (np.array([one.position for one in order]) - lps[:3, 3]) @ axes_33.T / np.array(grid.spacing_mm)
    columns, rows, planes = grid.shape_vox
    fill = array_ZYX.min()
    made = np.empty((planes, rows, columns), dtype=array_ZYX.dtype)

    def moved(number: int) -> np.ndarray:
        across, down, _ = places_N3[number]
        return _moved(_moved(array_ZYX[number].astype(np.float32), down, rows, fill).T, across, columns, fill).T

    last: dict[int, np.ndarray] = {}
    for plane in range(planes):
        after = int(np.clip(np.searchsorted(places_N3[:, 2], plane), 1, len(order) - 1))
        share = float(np.clip((plane - places_N3[after - 1, 2]) / (places_N3[after, 2] - places_N3[after - 1, 2]), 0, 1))
        last = {number: last[number] if number in last else moved(number) for number in (after - 1, after)}
        values = (1 - share) * last[after - 1] + share * last[after]
        made[plane] = np.rint(values) if made.dtype.kind == "i" else values
    return made


def _moved(image: np.ndarray, by: float, size: int, fill: float) -> np.ndarray:
    # Linear along the first axis, on `size` places; `fill` beyond half a pixel outside.
    at = np.arange(size) - by
    at[np.abs(at - np.rint(at)) < 1e-3] = np.rint(at[np.abs(at - np.rint(at)) < 1e-3])
    low = np.clip(np.floor(at).astype(int), 0, len(image) - 1)
    high = np.clip(low + 1, 0, len(image) - 1)
    share = np.clip(at - low, 0, 1)[:, None].astype(np.float32)
    values = image[low] if not share.any() else image[low] * (1 - share) + image[high] * share
    values[(at < -0.5) | (at > len(image) - 0.5)] = fill
    return values


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the C++ readers from writing to stderr: their warnings hold file names and header text. Their errors still raise."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
