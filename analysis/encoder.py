"""The encoder to take away: from pixels to features in one module, or as a program that needs nothing of ours."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import ResNetEncoder
from training.trained import Trained, read_trained

OPSET = 18


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
    """The encoder of a checkpoint; raises CheckpointError."""
    return image_encoder(read_trained(None, Path(checkpoint), []))


class _Outputs(nn.Module):
    """`encoder`, whose features are a tuple with a name for each in the exported graph."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = self.encoder(pixels)
        return found["z"], found["pooled"]


def export(encoder: ImageEncoder, folder: Path, notes: dict[str, str]) -> dict[Path, float]:
    """Write encoder.pt2 (torch.export) and encoder.onnx, for any number of images; returns how far each is off.

    Both take pixels (N, 3, image_size, image_size) uint8 and give (z, pooled). `notes` lie in both: in encoder.pt2 as
    the extra file notes.json, in encoder.onnx as metadata. The figure is the largest difference of a feature, over
    random images, from what the module gives.
    """
    import onnx
    import onnxruntime

    for name in ("onnx_ir", "onnxscript", "torch.onnx"):  # they tell of each pass over the graph
        logging.getLogger(name).setLevel(logging.WARNING)
    size = encoder.image_size
    pixels = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = encoder(pixels)
    notes = notes | {"input": f"pixels, (N, 3, {size}, {size}) uint8", "outputs": "z, pooled"}
    folder.mkdir(parents=True, exist_ok=True)

    program = torch.export.export(
        _Outputs(encoder), (pixels,), dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)}}
    )
    torch_path = folder / "encoder.pt2"
    partial = folder / "encoder.partial.pt2"
    torch.export.save(program, partial, extra_files={"notes.json": json.dumps(notes)})
    partial.replace(torch_path)

    onnx_path = folder / "encoder.onnx"
    partial = folder / "encoder.partial.onnx"
    torch.onnx.export(
        program,
        f=str(partial),
        input_names=["pixels"],
        output_names=["z", "pooled"],
        opset_version=OPSET,
        external_data=False,
        verbose=False,
    )
    model = onnx.load(partial)
    onnx.helper.set_model_props(model, notes)
    onnx.checker.check_model(model)
    onnx.save(model, partial)
    partial.replace(onnx_path)

    found: dict[Path, Any] = {
        torch_path: torch.export.load(torch_path).module()(pixels),
        onnx_path: onnxruntime.InferenceSession(onnx_path, providers=["CPUExecutionProvider"]).run(
            ["z", "pooled"], {"pixels": pixels.numpy()}
        ),
    }
    return {
        path: max(
            (torch.as_tensor(values) - expected[name]).abs().max().item()
            for name, values in zip(("z", "pooled"), outputs, strict=True)
        )
        for path, outputs in found.items()
    }
