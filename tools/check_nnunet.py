"""A volssl export in the hands of stock nnU-Net: plan, export, preprocess, train, validate, predict; on phantoms, in its own environment.

    make nnunet

What nnU-Net loaded must be what was exported, and its encoder must see in a turned image the turned maps of volssl's. The names and shapes
of nnU-Net's network are compared with tests/export/nnunet_keys.json, by which every run of the tests checks the export; --record writes it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from volssl.archive import write_nifti
from volssl.export import Options, bundle, run
from volssl.export.nnunet_plans import name_of
from volssl.nets.resenc import ResEncUNet
from volssl.volume import Grid

ROOT = Path(__file__).parents[1]
KEYS = ROOT / "tests" / "export" / "nnunet_keys.json"
NAME, CASES, CHANNELS = "Dataset042_Phantom", 5, 4
SHAPE, SPACING = (36, 32, 20), (1.0, 1.0, 2.0)
# Anisotropic on purpose: a kernel with its axes in the wrong order does not even have the right shape.
NET: dict[str, Any] = {
    "features": (4, 6, 8),
    "blocks": (1, 2, 1),
    "strides": (1, (2, 2, 1), 2),
    "kernels": ((3, 3, 1), 3, 3),
}


def main() -> None:
    """Run it all; the first thing that does not hold raises."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, default=ROOT / "build" / "nnunet-venv" / "bin" / "python")
    parser.add_argument("--record", action="store_true", help="write tests/export/nnunet_keys.json anew")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="volssl-nnunet-") as folder:
        Check(Path(folder), asked.python).run(record=asked.record)


class Check:
    """Folders and environment of one such run."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder, self.python = folder, python.absolute()
        self.raw, self.ready, self.results = (folder / name for name in ("raw", "preprocessed", "results"))
        self.environment = os.environ | {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.ready),
            "nnUNet_results": str(self.results),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "1",
            "nnUNet_compile": "f",
            "MPLBACKEND": "agg",
        }
        self.environment.pop("PYTHONPATH", None)

    def run(self, *, record: bool) -> None:
        """Every step, in order, each with its time."""
        _write_cases(self.raw / NAME)
        self.nnunet("plan_and_preprocess", "-d", "42", "--verify_dataset_integrity", "--no_pp", "-npfp", "1")
        encoder, written = _bundle(self.folder / "bundle")
        planned = self.ready / NAME / "nnUNetPlans.json"
        out = self.folder / "nnunet"
        print(run(written, to="nnunet", out=out, options=Options(plans=planned)).message)
        plans = name_of(bundle.load_bundle(written).card)
        (self.ready / NAME / f"{plans}.json").write_bytes((out / "nnUNetPlans.json").read_bytes())
        self.nnunet("preprocess", "-d", "42", "-plans_name", plans, "-c", "3d_fullres", "-np", "1")
        self.train(plans, out / "checkpoint.pth", encoder, record=record)
        images, found = self.raw / NAME / "imagesTs", self.folder / "predicted"
        of_network = ("-d", "42", "-c", "3d_fullres", "-f", "0", "-p", plans, "-device", "cpu", "-npp", "1", "-nps", "1")
        self.nnunet("predict", "-i", images, "-o", found, *of_network, "--disable_tta")
        assert sorted(path.name for path in found.glob("*.nii.gz")) == ["case_9.nii.gz"], "nnU-Net predicted nothing"
        trained = self.results / NAME / f"nnUNetTrainer__{plans}__3d_fullres" / "fold_0"
        assert (trained / "checkpoint_final.pth").exists() and (trained / "validation" / "summary.json").exists()

    def train(self, plans: str, checkpoint: Path, encoder: Any, *, record: bool) -> None:
        """Train from the export, and hold what nnU-Net loaded against it."""
        x_BCXYZ = torch.randn(1, 1, 16, 16, 8)
        torch.save(_turned(x_BCXYZ).expand(-1, CHANNELS, -1, -1, -1).contiguous(), self.folder / "x.pt")
        command = [ROOT / "tools" / "nnunet_train.py", self.folder / "seen.pt", self.folder / "x.pt"]
        arguments = ("42", "3d_fullres", "0", "-p", plans, "-pretrained_weights", checkpoint, "-device", "cpu")
        self.timed("train", self.python, *command, *arguments)
        seen = torch.load(self.folder / "seen.pt", weights_only=True)
        exported = torch.load(checkpoint, weights_only=True)["network_weights"]
        loaded = {name: tensor for name, tensor in seen["tensors"].items() if ".seg_layers." not in name}
        assert loaded.keys() == exported.keys(), "nnU-Net has other names than the export"
        assert all(torch.equal(tensor, exported[name]) for name, tensor in loaded.items()), "nnU-Net holds other tensors"
        for one, other in zip(seen["maps"], encoder(x_BCXYZ), strict=True):
            torch.testing.assert_close(one, _turned(other), atol=1e-4, rtol=1e-3)
        print(f"{len(loaded)} tensors are loaded as exported; {len(seen['maps'])} maps agree")
        _keys({name: list(tensor.shape) for name, tensor in seen["tensors"].items()}, record=record)

    def nnunet(self, command: str, *arguments: Any) -> None:
        """One of nnU-Net's own commands."""
        self.timed(command, self.python.with_name(f"nnUNetv2_{command}"), *arguments)

    def timed(self, name: str, *command: Any) -> None:
        """Run and tell how long it took. Its output is shown where it fails."""
        begun = time.monotonic()
        done = subprocess.run([str(part) for part in command], env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"nnU-Net {name} failed:\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
        print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)


def _turned(x_BCXYZ: torch.Tensor) -> torch.Tensor:
    return x_BCXYZ.permute(0, 1, 4, 3, 2).contiguous()


def _bundle(folder: Path) -> tuple[Any, Path]:
    torch.manual_seed(0)
    net = ResEncUNet(**NET).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    card = bundle.Card(
        architecture={"name": "resenc", "arguments": net.arguments},
        in_channels=1,
        spacing_mm=SPACING,
        orientation="RAS",
        intensity={"modality": "CT", "clip": [-1024, 3071], "window": [-200, 300], "percentiles": None, "normalisation": "zscore"},
        method="pcrlv2",
        recipe={},
        steps=1,
        data={},
        volssl_version="0",
        citations=("A paper",),
        patch_vox=(16, 16, 8),
    )
    return net.encoder, bundle.write(folder, net.encoder, card, decoder=net.decoder)


def _write_cases(root: Path) -> None:
    grid = Grid(SHAPE, np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0]))
    for case in (*range(CASES), 9):
        rng = np.random.default_rng(case)
        label = np.zeros(SHAPE, np.uint8)
        x, y, z = rng.integers(4, 12, 3)
        label[x : x + 12, y : y + 12, z : z + 6] = 1
        for channel in range(CHANNELS):
            image = rng.normal(40 + 20 * channel, 30, SHAPE) + 120 * label
            folder = "imagesTs" if case == 9 else "imagesTr"
            write_nifti(root / folder / f"case_{case}_{channel:04d}.nii.gz", image.astype(np.int16), grid, np.int16)
        if case != 9:
            write_nifti(root / "labelsTr" / f"case_{case}.nii.gz", label, grid, np.uint8)
    about = {
        "channel_names": {str(channel): "CT" for channel in range(CHANNELS)},
        "labels": {"background": 0, "thing": 1},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(about))


def _keys(found: dict[str, list[int]], *, record: bool) -> None:
    if record:
        told = {"nnunetv2": "2.8.1", "net": NET, "channels": CHANNELS, "classes": 2, "shapes": found}
        KEYS.write_text(json.dumps(told, indent=0) + "\n")
    assert json.loads(KEYS.read_text())["shapes"] == found, f"{KEYS} is of another network; make it anew with --record"


if __name__ == "__main__":
    sys.exit(main())
