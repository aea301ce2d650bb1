"""Faults put into DICOM files."""

import numpy as np
import pydicom


def change(path, **tags):
    """Set tags of a file by keyword; None takes one away."""
    data = pydicom.dcmread(path)
    for keyword, value in tags.items():
        if value is None:
            delattr(data, keyword)
        else:
            setattr(data, keyword, value)
    data.save_as(path)


def shift(path, *, along=0.0, lateral=0.0):
    """Move a slice by mm, along the stack's normal or along its columns."""
    data = pydicom.dcmread(path)
    row, column = np.split(np.array(data.ImageOrientationPatient, dtype=float), 2)
    moved = np.array(data.ImagePositionPatient, dtype=float) + along * np.cross(row, column) + lateral * column
    data.ImagePositionPatient = [f"{v:.9g}" for v in moved]
    data.save_as(path)
