"""A fine-tuned network for other tools: as a MONAI bundle or an ONNX graph, and that graph as a model again, run by ONNX Runtime.

The formats themselves are on the shelf `export/`; what is here knows the plan of a fine-tuned network.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from volssl.components import Cleaning
from volssl.export import Options, Writer, norm_of, patch_of
from volssl.export import monai as bundles
from volssl.export import onnx as graphs
from volssl.files import BadInput, read_json, sha256, write_json, write_text
from volssl.nets.standalone import SegmentationNetwork
from volssl.recipe import arguments
from volssl.segment import Model, Plan, Preparation, read_model


class WholeNet(nn.Module):
    """A segmentation network with what happens to a patch right before it, so that who runs it need not know: patch -> logits."""

    def __init__(self, net: nn.Module, preparation: Preparation) -> None:
        super().__init__()
        self.net, self.preparation = net, preparation

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        """(B, C, X, Y, Z) as `Preparation.image` gives it -> logits (B, K, X, Y, Z)."""
        return self.net(self.preparation.patch(x_BCXYZ))


def onnx(source: Path, options: Options) -> Writer:
    """Check that a finetune run can become `segmentation.onnx`. Raises: BadInput: no sound model, sides that do not fit, no onnx."""
    options.refuse("onnx", "patch")
    graphs.libraries()
    model = read_model(source)
    plan = replace(model.plan, patch_vox=_patch(model, options))
    shape = (1, len(plan.channels), *plan.patch_vox)

    def write(out: Path) -> str:
        difference = graphs.write_graph(out / "segmentation.onnx", WholeNet(model.net, plan.preparation), shape, ["logits"])
        about = {"sha256": sha256(out / "segmentation.onnx"), "plan": asdict(plan)}
        write_text(out / "README.md", graphs.readme("segmentation.onnx", shape, f"logits: {_meaning(plan)}", _voxels(plan)))
        write_json(out / "onnx.json", graphs.described("segmentation.onnx", shape, difference) | about)
        sides = "x".join(map(str, plan.patch_vox))
        return f"segmentation.onnx, patches of {sides}; ONNX Runtime differs from torch by at most {difference:.1e}"

    return write


def monai(source: Path, options: Options) -> Writer:
    """Check that a finetune run can become a MONAI bundle. Raises: BadInput: no sound model, sides that do not fit."""
    options.refuse("monai", "patch")
    model = read_model(source)
    plan, net = model.plan, model.net
    patch_vox, preparation = _patch(model, options), plan.preparation
    settings = {"out_channels": plan.outputs, "deep_supervision": plan.deep_supervision, "zscore": preparation.patches == "zscore"}
    network = SegmentationNetwork(**plan.architecture, **settings)
    network.net.load_state_dict(net.state_dict(), strict=True)
    how = {"how": preparation.normalisation, "window": list(preparation.window), "nonzero": preparation.nonzero}
    modality = "CT" if preparation.normalisation == "window" else "MR"
    pred = {
        "type": "image",
        "format": "segmentation",
        "num_channels": plan.outputs,
        "spatial_shape": list(patch_vox),
        "is_patch_data": True,
    }
    contents = bundles.Contents(
        network=network,
        definition={"_target_": "scripts.standalone.SegmentationNetwork", **plan.architecture, **settings},
        inference=bundles.preparing(how, preparation.spacing_mm)
        | bundles.windows(patch_vox, overlap=plan.inference.overlap, batch=plan.inference.batch)
        | _finishing(plan),
        task=f"Segmentation of {', '.join(plan.targets)}",
        description=f"Logits: {_meaning(plan)}. The run gives label maps on each image's own grid.",
        image=bundles.image_format(modality, plan.channels, patch_vox),
        pred=pred
        | {"dtype": "float32", "value_range": [], "channel_def": {str(number): name for number, name in enumerate(_channels(plan))}},
        about={"volssl_plan": asdict(plan)},
        text=_left_out(plan),
    )
    return lambda out: bundles.write(out, contents, patch_vox)


def _patch(model: Model, options: Options) -> tuple[int, int, int]:
    return patch_of(options.patch, model.plan.patch_vox, model.net.net, norm_of(model.plan.architecture))


def _finishing(plan: Plan) -> dict[str, Any]:
    """Shares, their way back to the image's grid and the label map, as keys of inference.json."""
    averaged = {"_target_": "scripts.standalone.Shares", "regions": bool(plan.regions), "flips": list(plan.inference.flips)}
    back = {"_target_": "Invertd", "keys": "pred", "transform": "@turn", "orig_keys": "image", "nearest_interp": False, "to_tensor": True}
    decided = {"_target_": "scripts.standalone.Decide", "values": plan.values, "regions": {k: list(v) for k, v in plan.regions.items()}}
    saved = {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "output_postfix": "", "separate_folder": False}
    steps = [back, {"_target_": "Lambdad", "keys": "pred", "func": decided}, saved | {"output_dtype": "uint8", "resample": False}]
    return {
        "channels": len(plan.channels),
        "shares": averaged | {"network": "@network"},
        "finish": {"_target_": "Compose", "transforms": steps},
        "run": ["$standalone.run(@items, @shares, prepare=@prepare, inferer=@inferer, finish=@finish, key='pred')"],
    }


def _channels(plan: Plan) -> list[str]:
    """Names of the logits' channels: the regions, or background and the labels."""
    return list(plan.regions) or ["background", *sorted(plan.labels, key=plan.labels.__getitem__)]


def _left_out(plan: Plan) -> str:
    told = "What differs from `volssl predict`: MONAI's own resampling"
    if plan.cleaning != Cleaning():
        told += "; and the finished map is not cleaned (`volssl_plan` in configs/metadata.json says by which rules volssl does it)"
    return told + ".\n"


def _meaning(plan: Plan) -> str:
    counts = "inside where its sigmoid is at least 0.5" if plan.regions else "of which the largest counts"
    return f"one channel per {'region' if plan.regions else 'class'} ({', '.join(_channels(plan))}), {counts}"


def _voxels(plan: Plan) -> str:
    return (
        f"Channels: {', '.join(plan.channels)}. Voxels: RAS+, prepared as `{asdict(plan.preparation)}`; the normalisation of each patch "
        "is in the graph. A volume larger than the patch is taken in windows; `volssl predict` does it with this folder as RUN."
    )


def read(run: Path, device: torch.device | str = "cpu") -> Model:
    """The model of a finetune run, or of an ONNX export of one. Raises: BadInput: neither, or damaged."""
    return read_graph(run) if (run / "onnx.json").exists() else read_model(run, device)


def checksum(run: Path) -> str:
    """What tells the weights of a run, or of an export of one, from others."""
    return read_json(run / ("onnx.json" if (run / "onnx.json").exists() else "model.json"))["sha256"]


def read_graph(folder: Path) -> Model:
    """A model whose network is a graph in ONNX Runtime, on the CPU. Raises: BadInput: no fine-tuned network's graph, or another file."""
    values = read_json(folder / "onnx.json")
    if not isinstance(values, dict) or not isinstance(values.get("plan"), dict):
        raise BadInput(f"{folder}/onnx.json: must be of a fine-tuned network, with its plan; found none; export a finetune run --to onnx")
    path = folder / "segmentation.onnx"
    if not path.exists() or sha256(path) != values.get("sha256"):
        raise BadInput(f"{path}: must be the file onnx.json was written for; found {'another' if path.exists() else 'nothing there'}")
    known = {field.name for field in fields(Plan)}
    plan = Plan(**arguments(Plan, {name: value for name, value in values["plan"].items() if name in known}, "onnx.json"))
    # The graph normalises its patches itself.
    bare = replace(plan, preparation=replace(plan.preparation, patches="none"), inference=replace(plan.inference, precision="fp32"))
    net: Any = _GraphNet(path)
    return Model(bare, net)


class _GraphNet(nn.Module):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(0), requires_grad=False)  # by which a model asks for the device
        self.session = graphs.session(path)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> logits (B, K, X, Y, Z)."""
        (logits,) = self.session.run(["logits"], {"image": x_BCXYZ.float().contiguous().numpy()})
        return torch.from_numpy(logits)
