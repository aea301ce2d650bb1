"""What metadata.json of a MONAI bundle must hold, as a JSON schema that travels with the bundle, so that it can be verified offline.

Written from MONAI's bundle specification and its schema of 2024-07-25, to whose address metadata.json points; a test holds that what is
required there is required here.
"""

from __future__ import annotations

from typing import Any

SCHEMA_URL = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"


def _text(*names: str) -> dict[str, Any]:
    return {name: {"type": "string"} for name in names}


def _mappings(*names: str) -> dict[str, Any]:
    return {name: {"type": "object"} for name in names}


TENSOR = {
    "type": "object",
    "properties": {
        **_text("type", "format", "dtype"),
        **_mappings("channel_def"),
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
    },
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
}
VALUES = {"type": "object", "additionalProperties": {"anyOf": [{"type": ["number", "string", "boolean"]}, TENSOR]}}
NETWORK = {
    "type": "object",
    "properties": {"inputs": VALUES, "outputs": VALUES, "post_processed_outputs": VALUES},
    "required": ["inputs", "outputs"],
}
REQUIRED = (
    *("schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version"),
    *("task", "description", "authors", "copyright", "network_data_format"),
)
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2019-09/schema",
    "type": "object",
    "properties": {
        **_text("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors", "copyright"),
        **_text("data_source", "data_type", "image_classes", "label_classes", "pred_classes", "intended_use"),
        **_mappings("changelog", "required_packages_version", "eval_metrics", "supported_apps"),
        "references": {"type": "array", "items": {"type": "string"}},
    },
    "patternProperties": {"^[_a-zA-Z0-9]+_data_format$": NETWORK},
    "required": list(REQUIRED),
}
