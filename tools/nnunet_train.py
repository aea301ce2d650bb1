"""`nnUNetv2_train`, cut short: one epoch of few steps. Runs in nnU-Net's own environment and leaves what it loaded.

    python tools/nnunet_train.py SEEN.pt X.pt [arguments of nnUNetv2_train]

SEEN.pt then holds the network's tensors right after `-pretrained_weights` was loaded, and its encoder's maps of the image in X.pt.
Nothing of nnU-Net is exchanged but the length of the training.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from nnunetv2.run import run_training  # pyright: ignore[reportMissingImports]
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # pyright: ignore[reportMissingImports]

STEPS = {"num_epochs": 1, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}


def main() -> None:
    """Train with the arguments that follow the two files."""
    seen, image = sys.argv[1:3]
    sys.argv[1:3] = []
    begin, load = nnUNetTrainer.__init__, run_training.load_pretrained_weights

    def short(self: Any, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        vars(self).update(STEPS)

    # nnU-Net keeps the names and values that its trainer was made with, read off the signature.
    short.__wrapped__ = begin  # type: ignore[attr-defined]

    def load_and_look(network: Any, *given: Any, **named: Any) -> None:
        load(network, *given, **named)
        with torch.no_grad():
            maps = network.encoder(torch.load(image, weights_only=True))
        torch.save({"tensors": network.state_dict(), "maps": maps}, seen)

    nnUNetTrainer.__init__ = short
    run_training.load_pretrained_weights = load_and_look
    run_training.run_training_entry()


if __name__ == "__main__":
    main()
