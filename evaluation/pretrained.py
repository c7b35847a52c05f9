"""Networks of other projects that measure images. The user gives their weights as files; nothing is downloaded."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config.errors import ConfigError
from utils.run_folder.checkpoint import CheckpointError, read_tensors

LPIPS_SIZE = 64  # smaller images are enlarged


def _read(path: Path, option: str, what: str, build: Callable[[Any], nn.Module]) -> nn.Module:
    """Returns the network that `build` makes of the weights in a file. Raises ConfigError if they do not fit."""
    if not path.is_file():
        raise ConfigError(f"{option}: there is no file {path}: name a file with {what}, or leave {option} out")
    try:
        weights, _ = read_tensors(path)
        return build(weights).eval().requires_grad_(False)
    except CheckpointError as error:
        raise ConfigError(f"{option}: {error}") from None
    except (RuntimeError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{option} {path} does not hold {what}: use another file, or leave {option} out") from None


def load_inception(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Returns a function pixels (N, 3, H, W) uint8 -> features (N, 2048) of the Inception network of FID.

    Raises ConfigError if the file does not hold torch-fidelity's weights.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    def build(weights: Any) -> nn.Module:
        # torch-fidelity unpickles its file without restrictions, so it gets tensors that have been read safely.
        safe = io.BytesIO()
        torch.save(weights, safe)
        safe.seek(0)
        return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=safe)

    network = _read(path, "--inception", "the Inception weights of torch-fidelity", build).to(device)
    return lambda pixels: network(pixels.to(device))[0]


def load_lpips(path: Path, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns a function images, sources (N, 3, H, W) in [-1, 1] -> LPIPS (N,).

    The learned weights of the layers are part of torchmetrics. Raises ConfigError if the file does not hold
    torchvision's AlexNet weights.
    """
    # Private: the public class downloads AlexNet's weights.
    from torchmetrics.functional.image.lpips import _LPIPS

    def build(weights: Any) -> nn.Module:
        network = _LPIPS(net="alex", pnet_rand=True)
        for part in network.net.children():
            for index, layer in part.named_children():  # numbered as in torchvision
                layer.load_state_dict({name: weights[f"features.{index}.{name}"] for name in layer.state_dict()})
        return network

    network = _read(path, "--lpips", "torchvision's AlexNet weights", build).to(device)

    def lpips(images: Tensor, sources: Tensor) -> Tensor:
        size = max(LPIPS_SIZE, images.shape[-1])
        large = (
            nn.functional.interpolate(each, (size, size), mode="bilinear", align_corners=False).to(device)
            for each in (images, sources)
        )
        return network(*large).flatten()

    return lpips
