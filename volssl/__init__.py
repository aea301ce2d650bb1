"""volssl: self-supervised pretraining on 3D CT and MRI, from a raw archive to weights other tools accept."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that holds it. A module is imported at first use, so that `import volssl` stays instant.
_HOMES = {
    "BadInput": "volssl.files",
    "Outcome": "volssl.files",
    "Grid": "volssl.volume",
    "Volume": "volssl.volume",
    "read_image": "volssl.archive",
    "read_label": "volssl.archive",
    "write_nifti": "volssl.archive",
    "Store": "volssl.store",
    "UNet": "volssl.nets.unet",
    "SegmentationNet": "volssl.nets.heads",
    "load_bundle": "volssl.export.bundle",
    "load_decoder": "volssl.export.bundle",
    "load_encoder": "volssl.export.bundle",
    "match_weights": "volssl.export.bundle",
    "preparation_of": "volssl.card",
}

if TYPE_CHECKING:
    from volssl.archive import read_image as read_image
    from volssl.archive import read_label as read_label
    from volssl.archive import write_nifti as write_nifti
    from volssl.card import preparation_of as preparation_of
    from volssl.export.bundle import load_bundle as load_bundle
    from volssl.export.bundle import load_decoder as load_decoder
    from volssl.export.bundle import load_encoder as load_encoder
    from volssl.export.bundle import match_weights as match_weights
    from volssl.files import BadInput as BadInput
    from volssl.files import Outcome as Outcome
    from volssl.nets.heads import SegmentationNet as SegmentationNet
    from volssl.nets.unet import UNet as UNet
    from volssl.store import Store as Store
    from volssl.volume import Grid as Grid
    from volssl.volume import Volume as Volume

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'volssl' has no attribute {name!r}; public are: {', '.join(_HOMES)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
