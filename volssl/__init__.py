"""volssl: self-supervised pretraining on 3D CT and MRI, from a raw archive to weights other tools accept."""

__version__ = "0.1.0"
