"""ONNX: a network at a fixed patch size as one graph, checked against torch by ONNX Runtime before it is called done.

The batch may have any size, the sides may not: fixed sides are what every runtime and compiler takes. The graph holds no name, path or
stack of the machine that wrote it. onnx, onnxscript and onnxruntime come with the extra `[onnx]`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from volssl import __version__
from volssl.export import Options, Writer, norm_of, patch_of
from volssl.export.bundle import load_encoder
from volssl.files import BadInput, atomic, write_json, write_text

LARGEST_DIFFERENCE = 1e-4  # between torch and ONNX Runtime, absolute
LARGEST_SHARE = 1e-5  # of the outputs' largest value, where that allows more: what float32 keeps of large values
OPSET = 20
BATCH = 2  # of the check; the graph is traced at another
LARGEST_BYTES = 2**31 - 2**20  # of one file: what protocol buffers hold


def export(source: Path, options: Options) -> Writer:
    """Check that a bundle's encoder can become `encoder.onnx`. Raises: BadInput: no patch size, sides that do not fit, no onnx."""
    options.refuse("onnx", "patch", "channels")
    libraries()
    loaded, card = load_encoder(source, in_channels=options.channels)
    encoder: Any = loaded
    patch_vox = patch_of(options.patch, card.get("patch_vox"), encoder, norm_of(card["architecture"]))
    shape = (1, options.channels or card["in_channels"], *patch_vox)

    def write(out: Path) -> str:
        names = [f"features_{level}" for level in range(len(encoder.channels))]
        difference = write_graph(out / "encoder.onnx", encoder, shape, names)
        outputs = [{"name": n, "channels": c, "stride": list(s)} for n, c, s in zip(names, encoder.channels, encoder.strides, strict=True)]
        about = {"outputs": outputs, "card": card}
        write_json(out / "onnx.json", described("encoder.onnx", shape, difference) | about)
        write_text(out / "README.md", readme("encoder.onnx", shape, "the feature maps, finest first", _voxels(card)))
        return f"encoder.onnx, patches of {'x'.join(map(str, patch_vox))}; ONNX Runtime differs from torch by at most {difference:.1e}"

    return write


def libraries() -> tuple[ModuleType, ModuleType]:
    """onnx and onnxruntime. Raises: BadInput: if they are not installed."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ModuleNotFoundError as error:
        raise BadInput(f"--to onnx: needs onnx, onnxscript and onnxruntime; found no {error.name}; install volssl[onnx]") from None
    return onnx, onnxruntime


def write_graph(path: Path, net: nn.Module, shape: Sequence[int], outputs: Sequence[str]) -> float:
    """Write `net` as a graph from `image` to `outputs`, and run it.

    Args: shape: of the input, (1, C, X, Y, Z); the batch is free in the graph.
    Returns: the largest difference from torch, on noise.
    Raises: BadInput: a graph beyond 2 GB, or one that computes something else than torch does.
    """
    onnx, runtime = libraries()
    net = net.eval().cpu().float()
    x_BCXYZ = torch.randn(BATCH, *shape[1:], generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad(), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        wanted = _listed(net(x_BCXYZ))
        program = torch.onnx.export(
            net,
            (x_BCXYZ,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(outputs),
            dynamic_shapes=({0: batch},),
        )
    assert program is not None
    packed = _anonymous(program.model_proto, onnx).SerializeToString()
    if len(packed) > LARGEST_BYTES:
        raise BadInput(f"--to onnx: a graph must stay below 2 GB; found {len(packed) / 1e9:.1f} GB; export a narrower network")
    with atomic(path) as temporary:
        temporary.write_bytes(packed)
    found = session(path, runtime).run(list(outputs), {"image": x_BCXYZ.numpy()})
    difference = max(float(np.abs(one - other.numpy()).max()) for one, other in zip(found, wanted, strict=True))
    allowed = max(LARGEST_DIFFERENCE, LARGEST_SHARE * max(float(other.abs().max()) for other in wanted))
    if not difference <= allowed:
        path.unlink()
        raise BadInput(
            f"--to onnx: ONNX Runtime must compute what torch does, to {allowed:.1g}; found a difference of {difference:.2g}; "
            "this network cannot be exported with the installed torch and onnxruntime"
        )
    return difference


def session(path: Path, runtime: ModuleType | None = None) -> Any:
    """ONNX Runtime's session on a graph, with as many threads as torch has. Raises: BadInput: a file that is no sound graph."""
    runtime = runtime or libraries()[1]
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a type of its own for each of a dozen reasons
        raise BadInput(f"{path}: must be a graph that ONNX Runtime runs; {type(error).__name__}; export it again") from None


def described(file: str, shape: Sequence[int], difference: float) -> dict[str, Any]:
    """What onnx.json says of every graph."""
    return {
        "graph": file,
        "volssl_version": __version__,
        "input": {"name": "image", "dtype": "float32", "shape": ["batch", *shape[1:]], "axes": "B C X Y Z, RAS+"},
        "difference_from_torch": difference,
    }


def readme(file: str, shape: Sequence[int], gives: str, voxels: str) -> str:
    """How a graph is run, without volssl."""
    return f"""# {file}

Takes `image`, float32 (batch, {", ".join(map(str, shape[1:]))}): channels, then X Y Z in RAS+ order. Gives {gives}.

{voxels}

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
outputs = session.run(None, {{"image": np.zeros((1, {", ".join(map(str, shape[1:]))}), dtype=np.float32)}})
```

`onnx.json` says the same for programs. Checked against torch by ONNX Runtime when it was written.
"""


def _voxels(card: Mapping[str, Any]) -> str:
    sides = " x ".join(f"{side:g}" for side in card["spacing_mm"])
    return f"Voxels as the encoder saw them: {card['orientation']}, {sides} mm; intensity `{card['intensity']}`."


def _listed(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _anonymous(model: Any, onnx: ModuleType) -> Any:
    """The graph without what torch notes beside it: stacks with the paths and lines of the machine that wrote it."""
    model.producer_name, model.producer_version, model.doc_string = "volssl", __version__, ""
    graphs = [model.graph, *model.functions]
    del model.metadata_props[:]
    while graphs:
        graph = graphs.pop()
        graph.doc_string = ""
        values = [] if isinstance(graph, onnx.FunctionProto) else [*graph.input, *graph.output, *graph.initializer]
        for part in (graph, *graph.value_info, *values, *graph.node):
            del part.metadata_props[:]
            part.doc_string = ""
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    # torch's exporter tells at length that torchvision, which nothing here needs, is not installed.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
