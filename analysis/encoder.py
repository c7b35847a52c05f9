"""The encoder to take away: from pixels to features in one module, or as a program that needs nothing of ours."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import ResNetEncoder
from training.trained import Trained, read_trained
from utils.files import replacing

OPSET = 18
TOLERANCE = 1e-4


class ImageEncoder(nn.Module):
    """Images as they are -> features: the EMA encoder with its normalisation.

    Attributes:
        image_size: of the images that it was trained on.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: ResNetEncoder, mean: list[float], std: list[float], image_size: int) -> None:
        super().__init__()
        self.encoder, self.image_size = encoder, image_size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """(N, 3, image_size, image_size) uint8 -> {"pooled": (N, pooled_dim), "z": (N, latent_dim)}, float32."""
        views = pixels.float().div(255).sub(self.mean).div(self.std)
        return self.encoder.features(views)


def image_encoder(trained: Trained) -> ImageEncoder:
    """Of a checkpoint, on the host, in evaluation mode; raises CheckpointError and DatasetError."""
    mean, std = trained.statistics()
    return ImageEncoder(trained.soda().encoder, mean, std, trained.config.data.image_size).eval().requires_grad_(False)


def load_encoder(checkpoint: str | Path) -> ImageEncoder:
    """The encoder of a checkpoint, on the host; raises CheckpointError, ConfigError and DatasetError."""
    return image_encoder(read_trained(None, Path(checkpoint), []))


class _Outputs(nn.Module):
    """`encoder`, whose features are a tuple with a name for each in the exported graph."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = self.encoder(pixels)
        return found["z"], found["pooled"]


class ExportError(Exception):
    """An exported encoder that does not give the features; nothing was written."""


def export(encoder: ImageEncoder, folder: Path, notes: dict[str, str]) -> dict[Path, float]:
    """Write encoder.pt2 (torch.export) and encoder.onnx, for any number of images; returns how far each is off.

    Both take pixels (N, 3, image_size, image_size) uint8 and give (z, pooled). `notes` lie in both: in encoder.pt2 as
    the extra file notes.json, in encoder.onnx as metadata. How far is the largest difference of a feature, over random
    images, from what the module gives; raises ExportError where it is more than TOLERANCE.
    """
    import onnx
    import onnxruntime

    for name in ("onnx_ir", "onnxscript", "torch.onnx"):  # they tell of each pass over the graph
        logging.getLogger(name).setLevel(logging.WARNING)
    size = encoder.image_size
    pixels = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    notes = notes | {"input": f"pixels, (N, 3, {size}, {size}) uint8", "outputs": "z, pooled"}
    folder.mkdir(parents=True, exist_ok=True)
    program = torch.export.export(
        _Outputs(encoder), (pixels,), dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)}}
    )

    def difference(found: Sequence[Any]) -> float:
        off = [
            (torch.as_tensor(f) - e).abs().max().item() for f, e in zip(found, _Outputs(encoder)(pixels), strict=True)
        ]
        if not max(off) <= TOLERANCE:
            raise ExportError(f"the exported encoder is off by {max(off):.2g}: nothing was written")
        return max(off)

    with replacing(folder / "encoder.pt2") as torch_path, replacing(folder / "encoder.onnx") as onnx_path:
        torch.export.save(program, torch_path, extra_files={"notes.json": json.dumps(notes)})
        torch.onnx.export(
            program,
            f=str(onnx_path),
            input_names=["pixels"],
            output_names=["z", "pooled"],
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
        model = onnx.load(onnx_path)
        onnx.helper.set_model_props(model, notes)
        onnx.checker.check_model(model)
        onnx.save(model, onnx_path)
        session = onnxruntime.InferenceSession(onnx_path, providers=["CPUExecutionProvider"])
        return {
            folder / "encoder.pt2": difference(torch.export.load(torch_path).module()(pixels)),
            folder / "encoder.onnx": difference(session.run(["z", "pooled"], {"pixels": pixels.numpy()})),
        }
