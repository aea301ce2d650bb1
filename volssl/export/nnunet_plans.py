"""What nnU-Net must know of a pretrained encoder: its layers, plans that pin them for a data set, and newer nnU-Net's adaptation plan.

All lists of three run Z Y X, as nnU-Net's arrays.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from volssl.files import BadInput, read_json

NETWORK = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
IMPORTED = ["conv_op", "norm_op", "dropout_op", "nonlin"]  # arguments that nnU-Net's plans give by name
CONFIGURATION = "3d_fullres"
PROPERTIES = "foreground_intensity_properties_per_channel"
IDENTITY = [0, 1, 2]
COARSEST = 4  # voxels that nnU-Net's planner leaves along each axis of the coarsest map
Z_SCORE, OF_CT = "ZScoreNormalization", "CTNormalization"


def turned(values: Sequence[Any]) -> list[Any]:
    """X Y Z -> Z Y X."""
    return list(values)[::-1]


def layers_of(known: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `volssl.nets.resenc` as nnU-Net's `arch_kwargs`."""
    stages = len(known["features"])
    return {
        "n_stages": stages,
        "features_per_stage": list(known["features"]),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [turned(kernel) for kernel in known["kernels"]],
        "strides": [turned(stride) for stride in known["strides"]],
        "n_blocks_per_stage": list(known["blocks"]),
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def stages_of(plans: Mapping[str, Any]) -> str:
    """Features and strides of the pinned network, in words."""
    layers = plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
    return ", ".join(f"{f} channels at stride {s}" for f, s in zip(layers["features_per_stage"], layers["strides"], strict=True))


def read_plans(path: Path) -> dict[str, Any]:
    """A data set's nnUNetPlans.json. Raises: BadInput: it is none, or plans no 3d_fullres."""
    plans = read_json(Path(path))
    needed = {"dataset_name", "plans_name", "configurations", "transpose_forward", PROPERTIES}
    if not isinstance(plans, dict) or not needed <= plans.keys() or not isinstance(plans["configurations"], dict):
        raise BadInput(f"--plans {path}: must be an nnUNetPlans.json of nnU-Net 2, with {', '.join(sorted(needed))}")
    if CONFIGURATION not in plans["configurations"]:
        raise BadInput(f"--plans {path}: must plan {CONFIGURATION}; found {', '.join(plans['configurations'])}; plan the data set for 3D")
    found = plans["configurations"][CONFIGURATION]
    faults = [f"{key} must be three numbers" for key in ("patch_size", "spacing") if len(_listed(found.get(key))) != 3]
    if sorted(_listed(plans["transpose_forward"])) != IDENTITY:
        faults.append("transpose_forward must be an order of 0, 1, 2")
    channels = {str(number) for number in range(len(_listed(found.get("normalization_schemes"))))}
    if not channels or not isinstance(plans[PROPERTIES], dict) or not channels <= plans[PROPERTIES].keys():
        faults.append(f"normalization_schemes must name a scheme for each channel of {PROPERTIES}")
    if faults:
        raise BadInput(f"--plans {path}: {'; '.join(faults)}; plan the data set again with nnU-Net 2")
    return plans


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def channels_of(card: Mapping[str, Any], base: Mapping[str, Any] | None, asked: int | None) -> int:
    """Input channels of the network to export. Raises: BadInput: --channels against the plans."""
    planned = None if base is None else len(base["configurations"][CONFIGURATION]["normalization_schemes"])
    if asked is not None and (asked < 1 or planned not in (None, asked)):
        raise BadInput(f"--channels must be {'at least 1' if planned is None else f'the {planned} of the plans'}; found {asked}")
    return asked or planned or card["in_channels"]


def patch_of(card: Mapping[str, Any], layers: Mapping[str, Any]) -> list[int]:
    """Patch that suits the network: the pretraining's largest view, but at least what leaves nnU-Net's 4 voxels at the coarsest."""
    seen = card.get("patch_vox") or (1, 1, 1)
    return [max(-(-side // step) * step, COARSEST * step) for side, step in zip(turned(seen), _stride(layers), strict=True)]


def _stride(layers: Mapping[str, Any]) -> list[int]:
    product = [1, 1, 1]
    for stride in layers["strides"]:
        product = [a * b for a, b in zip(product, stride, strict=True)]
    return product


def adaptation_plan(card: Mapping[str, Any], layers: dict[str, Any], channels: int) -> dict[str, Any]:
    """What newer nnU-Net reads from the checkpoint: plain values only, so that it loads with `weights_only=True`."""
    patch = patch_of(card, layers)
    configuration = {
        **_resampling(),
        "data_identifier": "volssl",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": "volssl",
        "spacing": turned(card["spacing_mm"]),
        "patch_size": turned(card["patch_vox"]) if card.get("patch_vox") else patch,
        "normalization_schemes": [_scheme(card)] * channels,
        "use_mask_for_norm": [False] * channels,
    }
    return {
        "architecture_plans": {"arch_class_name": NETWORK, "arch_kwargs": layers, "arch_kwargs_requiring_import": IMPORTED},
        "architecture_kwargs": layers,
        "pretrain_plan": {
            "dataset_name": "volssl",
            "plans_name": name_of(card),
            "original_median_spacing_after_transp": turned(card["spacing_mm"]),
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": IDENTITY,
            "transpose_backward": IDENTITY,
            "experiment_planner_used": "volssl",
            "configurations": {CONFIGURATION: configuration},
        },
        "pretrain_num_input_channels": channels,
        "recommended_downstream_patchsize": patch,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "key_to_lpe": None,
    }


def name_of(card: Mapping[str, Any]) -> str:
    """Identifier of the plans: that of the weights, so that data prepared for others are never taken for these."""
    return f"volsslPlans_{card['sha256'][:8]}"


def plans_for(card: Mapping[str, Any], layers: dict[str, Any], base: Mapping[str, Any] | None, *, channels: int) -> dict[str, Any]:
    """Plans that pin architecture, spacing, patch and intensities; all else is the data set's own, from `base`, or nnU-Net's usual.

    The axes stay as the images have them (nnU-Net may put the one of the thickest slices first), since the kernels have their order. The
    patch is the data set's, rounded to what the network's strides divide.
    """
    plans: dict[str, Any] = copy.deepcopy(dict(base)) if base is not None else _unplanned(card, layers, channels)
    order = plans["transpose_forward"]
    configuration = plans["configurations"][CONFIGURATION]
    name = name_of(card)
    configuration |= {
        "data_identifier": f"{name}_{CONFIGURATION}",
        "spacing": turned(card["spacing_mm"]),
        "patch_size": _divided(_untransposed(configuration["patch_size"], order), _stride(layers)),
        "architecture": {"network_class_name": NETWORK, "arch_kwargs": layers, "_kw_requires_import": IMPORTED},
    }
    for key in ("original_median_spacing_after_transp", "original_median_shape_after_transp"):
        if key in plans:
            plans[key] = _untransposed(plans[key], order)
    if "median_image_size_in_voxels" in configuration:
        configuration["median_image_size_in_voxels"] = _untransposed(configuration["median_image_size_in_voxels"], order)
    for key in ("inherits_from", "previous_stage", "next_stage"):
        configuration.pop(key, None)
    _pin_intensities(card, plans, configuration)
    return plans | {
        "plans_name": name,
        "transpose_forward": IDENTITY,
        "transpose_backward": IDENTITY,
        "configurations": {CONFIGURATION: configuration},
    }


def _untransposed(values: Sequence[Any], order: Sequence[int]) -> list[Any]:
    # nnU-Net's axis i is the image's axis order[i].
    turned_back: list[Any] = [None] * len(values)
    for place, axis in enumerate(order):
        turned_back[axis] = values[place]
    return turned_back


def _divided(patch: Sequence[int], stride: Sequence[int]) -> list[int]:
    sides = [max(1, round(side / step)) for side, step in zip(patch, stride, strict=True)]
    # Instance normalisation cannot take a single voxel.
    return [(2 if sides == [1, 1, 1] else count) * step for count, step in zip(sides, stride, strict=True)]


def _scheme(card: Mapping[str, Any]) -> str:
    return OF_CT if card["intensity"]["modality"] == "CT" else Z_SCORE


def _pin_intensities(card: Mapping[str, Any], plans: dict[str, Any], configuration: dict[str, Any]) -> None:
    """Channels of the modality of the pretraining are shown as there: CT clipped to the window. Channels of another stay as planned.

    CT without further normalisation is mapped to [0, 1] as in the pretraining. Where each patch was z-scored, the mean and deviation of the
    data set's foreground stand in, which differ from it by a shift and a scale that the first instance normalisation takes away.
    """
    schemes, properties = configuration["normalization_schemes"], plans[PROPERTIES]
    low, high = card["intensity"]["window"]
    for number, scheme in enumerate(schemes):
        if scheme != OF_CT or _scheme(card) != OF_CT:
            continue
        found = properties[str(number)]
        mean, deviation = low, high - low
        if card["intensity"]["normalisation"] == "zscore" and found.get("std"):
            mean, deviation = min(max(found["mean"], low), high), min(found["std"], high - low)
        properties[str(number)] = found | {"percentile_00_5": low, "percentile_99_5": high, "mean": mean, "std": deviation}


def _unplanned(card: Mapping[str, Any], layers: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """nnU-Net's usual settings for a data set that is not known."""
    low, high = card["intensity"]["window"]
    about = {"min": low, "max": high, "median": low, "mean": low, "std": 0.0, "percentile_00_5": low, "percentile_99_5": high}
    patch = patch_of(card, layers)
    configuration = {
        **_resampling(),
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch,
        "median_image_size_in_voxels": patch,
        "spacing": turned(card["spacing_mm"]),
        "normalization_schemes": [_scheme(card)] * channels,
        "use_mask_for_norm": [False] * channels,
        "batch_dice": False,
    }
    return {
        "dataset_name": "Dataset000_PUT_YOURS_HERE",
        "plans_name": "",
        "original_median_spacing_after_transp": turned(card["spacing_mm"]),
        "original_median_shape_after_transp": patch,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": IDENTITY,
        "transpose_backward": IDENTITY,
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "volssl",
        "label_manager": "LabelManager",
        PROPERTIES: {str(number): dict(about) for number in range(channels)},
    }


def _resampling() -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for kind, is_seg, order in (("data", False, 3), ("seg", True, 1), ("probabilities", False, 1)):
        chosen[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        chosen[f"resampling_fn_{kind}_kwargs"] = {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}
    return chosen
