"""A training step of PCRLv2's official preset against the plain fp32 eager network of the paper's code.

    python tools/bench_pretrain.py [--batch 2] [--rounds 3] [--out FILE]                 on a CPU
    python tools/bench_pretrain.py --device cuda --batch 32 --out results.json           on a GPU, all that is to be known in one visit

Reference: `tools/plain_pcrlv2.py`, written independently of volssl: Conv3d, BatchNorm3d, ReLU in place, MaxPool3d, ConvTranspose3d, in
fp32 and torch's default layout. Ours: volssl's method and network with the same weights, channels_last_3d. A step is three forward passes
(two globals of 64x64x32, 6 sub-crops of 16^3 a sample), all losses, backward and SGD with momentum and weight decay, on the same views.

Rows: floating-point operations a sample, counted by torch's FlopCounterMode; bytes that autograd keeps for the backward pass, counted once
per storage, without parameters and buffers (both on tensors without data, so they are the same on every machine); the step in fp32, after
outputs and gradients were compared (the run fails if they differ, see `differences`); the step in bf16 where the hardware multiplies it
(AVX-512 BF16, AMX, CUDA), else told as not measured.
On CUDA also samples per second end to end by `volssl.bench` from a store made here, the share of time waiting for data, peak memory, and
the up-step by each of the ways to compute it. There the reference runs at a batch of at most 8. A bare machine needs torch, lightning,
numpy, pyyaml, and the wheels of blosc2 (with its ndindex, msgpack, numexpr), pydantic and safetensors.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from paired import Row, paired, row
from plain_pcrlv2 import PlainPCRLv2
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from volssl.compiling import multiplies_bf16
from volssl.draws import Draws
from volssl.methods.pcrlv2 import PCRLv2, View, Views
from volssl.nets.unet import UNet

PROGRESS = 0.25


def fixed_views(batch: int, device: torch.device) -> Views:
    """One batch of views of the official preset, from parents of noise."""
    x = torch.rand(batch, 1, 128, 128, 112, generator=torch.Generator().manual_seed(0))
    views = PCRLv2(UNet(width=1)).views(x, Draws(0, 0, 0, batch), spacing_mm=(1.0, 1.0, 1.0))
    one, other = (View(view.seen.to(device), view.target.to(device)) for view in (views.one, views.other))
    return Views(one, other, views.locals.to(device), (), views.scale, views.local_scales)


def our_loss(method: PCRLv2, views: Views) -> Tensor:
    """The sum of all terms."""
    [(_, losses)] = list(method.turns(views, PROGRESS))
    return torch.stack([loss.float() for loss in losses.values()]).sum()


def plain_loss(plain: PlainPCRLv2, views: Views) -> Tensor:
    """The same from the plain network."""
    scales = (views.scale, *views.local_scales)
    return plain(views.one.seen, views.other.seen, views.locals, views.one.target, scales=scales, progress=PROGRESS)


def both(device: torch.device) -> tuple[PlainPCRLv2, PCRLv2]:
    """The two networks with the same weights."""
    torch.manual_seed(0)
    method = PCRLv2(UNet())
    plain = PlainPCRLv2()
    plain.load_state_dict(method.state_dict())
    method.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
    return plain.to(device).train(), method.to(device).train()


def stepper(module: nn.Module, loss_of: Callable[[], Tensor], bf16: bool = False) -> Callable[[], None]:
    """A training step of `module`."""
    optimizer = torch.optim.SGD(module.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)
    device = next(module.parameters()).device.type

    def run() -> None:
        with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def differences(plain: PlainPCRLv2, method: PCRLv2, views: Views) -> dict[str, float]:
    """Relative differences: of the loss; in double precision, since fp32 rounding grows through 14 normalised layers, of the decoded maps
    of a part of the first global, by their largest value, and of the gradients of
    a fixed weighting of those maps, each by its norm, the largest. (Gradients of the losses themselves say nothing at a batch of a few:
    batch normalisation of two numbers gives their signs, and its gradient is rounding.)"""
    with torch.no_grad():
        losses = float(plain_loss(plain, views)), float(our_loss(method, views))
    found = {"loss": abs(losses[0] - losses[1]) / abs(losses[0]), "maps": 0.0, "gradient": 0.0}
    nets = [copy.deepcopy(module.net).double() for module in (plain, method)]
    corner = views.one.seen[:, :, :32, :32, :16].double()
    maps = [net(corner) for net in nets]
    for one, other in zip(*maps, strict=True):
        found["maps"] = max(found["maps"], float((one - other).detach().abs().max() / one.detach().abs().max()))
    for of_side in maps:
        source = torch.Generator().manual_seed(0)
        weights = [torch.randn(one.shape, generator=source, dtype=torch.double).to(one.device) for one in of_side]
        torch.stack([(one * weight).mean() for one, weight in zip(of_side, weights, strict=True)]).sum().backward()
    ours = {name: parameter.grad for name, parameter in nets[1].named_parameters()}
    for name, parameter in nets[0].named_parameters():
        gradient = ours[name]
        assert parameter.grad is not None and gradient is not None, name
        # A bias before batch normalisation has no gradient but rounding.
        if not name.endswith(("conv.bias", "up.bias")):
            found["gradient"] = max(found["gradient"], float((parameter.grad - gradient).norm() / parameter.grad.norm()))
    return found


def saved_bytes(module: Any, loss_of: Callable[[Any, Views], Tensor], views: Views, *, bf16: bool) -> int:
    """Bytes that autograd keeps from forward to backward."""
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in own:
            kept[place] = tensor.detach()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        loss = loss_of(module, views)
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def kept_for_backward(batch: int) -> list[Row]:
    """Bytes of both sides."""
    with FakeTensorMode():
        views = hollow_views(batch)
        plain, method = PlainPCRLv2(), PCRLv2(UNet())
        reference = saved_bytes(plain, plain_loss, views, bf16=False) / batch / 1e6
        ours = [saved_bytes(method, our_loss, views, bf16=half) / batch / 1e6 for half in (False, True)]
    what = f"kept for backward, plain fp32 -> ours {{}}, batch {batch}"
    return [
        upper(what.format("fp32"), "MB/sample", reference, ours[0], goal=None),
        upper(what.format("bf16"), "MB/sample", reference, ours[1], goal=0.4),
    ]


def hollow_views(batch: int) -> Views:
    """Views without data, made inside a FakeTensorMode."""
    view = View(torch.zeros(batch, 1, 64, 64, 32), torch.zeros(batch, 1, 64, 64, 32))
    return Views(view, view, torch.zeros(6 * batch, 1, 16, 16, 16), (), 1, (0, 1, 2) * 4)


def operations(batch: int) -> list[float]:
    """GFLOP a sample of a step's forward and backward, plain and ours."""
    counted = []
    with FakeTensorMode():
        views = hollow_views(batch)
        for make, loss_of in ((PlainPCRLv2, plain_loss), (lambda: PCRLv2(UNet()), our_loss)):
            module: Any = make()
            with FlopCounterMode(display=False) as counter:
                loss_of(module, views).backward()
            counted.append(counter.get_total_flops() / batch / 1e9)
    return counted


def upper(what: str, unit: str, reference: float, ours: float, *, goal: float | None) -> Row:
    """A row whose ratio ours / reference must not exceed the goal."""
    ratio = ours / reference
    return Row(what, unit, reference, ours, ratio, ratio, ratio, goal, at_most=True)


def arithmetic() -> list[Row]:
    """What needs no timing."""
    rows = []
    for batch, goal in ((4, 0.70), (32, 0.62)):
        reference, ours = operations(batch)
        rows += [upper(f"operations of a step, batch {batch}", "GFLOP/sample", reference, ours, goal=goal), *kept_for_backward(batch)]
    return rows


def timings(given: argparse.Namespace, device: torch.device) -> tuple[list[Row], dict[str, Any]]:
    """The rows of the training step, and what is told besides."""
    batch = min(given.batch, 8) if device.type == "cuda" else given.batch
    views = fixed_views(batch, device)
    plain, method = both(device)
    told: dict[str, Any] = {"differences": differences(plain, method, views)}
    rows = []
    bf16 = multiplies_bf16(device.type) or given.emulate
    ours = {"fp32": stepper(method, lambda: our_loss(method, views))}
    if bf16:
        ours["bf16"] = stepper(method, lambda: our_loss(method, views), bf16=True)
    else:
        told["bf16 step"] = "not measured: no bf16 hardware"
    seconds = paired(stepper(plain, lambda: plain_loss(plain, views)), ours, rounds=given.rounds, clock=clock(device))
    for name, goal in (("fp32", 1.3), ("bf16", 2.0)):
        if name in ours:
            rows.append(row(f"training step, plain fp32 -> ours {name}, batch {batch}", seconds[name], per=batch, goal=goal))
    return rows, told


def clock(device: torch.device) -> Callable[[], float]:
    """CPU seconds of this process, or wall seconds once the GPU is done."""
    if device.type != "cuda":
        return time.process_time

    def finished() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return finished


def main() -> None:
    """Measure and print; exit 1 if the two sides do not compute the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="steps of the end-to-end run on CUDA")
    parser.add_argument("--no-timing", action="store_true", help="operations and bytes alone: quick, and the same on every machine")
    parser.add_argument("--emulate", action="store_true", help="time bf16 even where the hardware does not multiply it")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = torch.device(given.device)
    rows = arithmetic()
    told: dict[str, Any] = {}
    if not given.no_timing:
        timed_rows, told = timings(given, device)
        rows += timed_rows
    told |= {"torch": torch.__version__, "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}
    for one in rows:
        print(one.line())
    if device.type == "cuda":
        from gpu_visit import visit

        told |= visit(given.batch, given.steps)
    for name, value in told.items():
        print(f"{name}: {value}")
    if given.out:
        given.out.write_text(json.dumps({"rows": [asdict(one) for one in rows], **told}, indent=1) + "\n", encoding="utf-8")
    worst = told.get("differences", {})
    if worst and (worst["loss"] > 1e-3 or worst["maps"] > 1e-9 or worst["gradient"] > 1e-6):
        raise SystemExit(f"the two sides differ: {worst}")


if __name__ == "__main__":
    main()
