"""Export of an encoder to files that run without this repository: .pt2 (torch.export) and ONNX."""

import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from analysis.image_encoder import ImageEncoder
from config.errors import UserError
from utils.files import replacing

OPSET = 18
TOLERANCE = 1e-4
NAMES = ("z", "pooled")  # names of the outputs, in order

Run = Callable[[Tensor], list[Tensor]]
"""An exported encoder: pixels (N, 3, H, W) uint8 -> features, in the order of NAMES."""


class ExportError(UserError):
    """Error: the features of an exported encoder differ from those of the original module. No file was written."""


def export_encoder(encoder: ImageEncoder, paths: list[Path], notes: dict[str, str]) -> dict[Path, float]:
    """Writes the encoder to each path as a program that takes any number of images.

    The program takes pixels (N, 3, image_size, image_size) uint8 and returns (z, pooled).

    Args:
        paths: files to write; their endings are keys of FORMATS.
        notes: texts stored in each file, together with a description of its input and outputs.

    Returns:
        For each path, the largest absolute difference between the program's and the module's features, over random
        images.

    Raises:
        ExportError: a difference is above TOLERANCE. No file is written then.
    """
    size = encoder.image_size
    pixels = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    notes = notes | {"input": f"pixels, (N, 3, {size}, {size}) uint8", "outputs": ", ".join(NAMES)}
    module = _Tuple(encoder)
    program = torch.export.export(module, (pixels,), dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)}})
    expected, differences = module(pixels), {}
    with ExitStack() as files:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = files.enter_context(replacing(path))
            kind = FORMATS[path.suffix.lower()]
            kind.write(program, partial, notes)
            found = kind.load(partial)(pixels)
            off = [(f - e).abs().max().item() for f, e in zip(found, expected, strict=True)]
            if not max(off) <= TOLERANCE:
                raise ExportError(
                    f"the exported encoder's features differ from the model's by {max(off):.2g}; nothing was written: "
                    "try another version of torch or of the ONNX packages"
                )
            differences[path] = max(off)
    return differences


class _Tuple(nn.Module):
    """The encoder, with its features as a tuple in the order of NAMES."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        found = self.encoder(pixels)
        return tuple(found[name] for name in NAMES)


def _write_pt2(program: ExportedProgram, path: Path, notes: dict[str, str]) -> None:
    torch.export.save(program, path, extra_files={"notes.json": json.dumps(notes)})


def _load_pt2(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda pixels: list(module(pixels))


def _write_onnx(program: ExportedProgram, path: Path, notes: dict[str, str]) -> None:
    import onnx

    for name in ("onnx_ir", "onnxscript", "torch.onnx"):  # they log every pass over the graph
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.onnx.export(
        program,
        f=str(path),
        input_names=["pixels"],
        output_names=list(NAMES),
        opset_version=OPSET,
        external_data=False,
        verbose=False,
    )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, notes)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixels: [torch.from_numpy(f) for f in session.run(list(NAMES), {"pixels": pixels.numpy()})]


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        write: writes the program and the notes: in .pt2 as the extra file notes.json, in .onnx as metadata.
        load: reads the file back, so that its features can be compared with the module's.
    """

    write: Callable[[ExportedProgram, Path, dict[str, str]], None]
    load: Callable[[Path], Run]


FORMATS = {".pt2": Format(_write_pt2, _load_pt2), ".onnx": Format(_write_onnx, _load_onnx)}
