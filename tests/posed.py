"""Photographs with cameras, and tiny runs on them, for several tests."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from config.reading import load_config
from config.schema import Data
from datasets.images import Images
from datasets.posed import open_posed
from experiment.opening import open_experiment
from tests.conftest import ROOT, TINY_MODEL
from training.state import initial_state

AZIMUTHS = (0, 60, 120, 180, 240, 300)
UNMOVED = "{crop_flip_probability: 0, randaugment_probability: 0}"


def write_objects(root: Path, objects: tuple[str, ...] = ("a/a1", "a/a2", "b/b1", "b/b2"), size: int = 8) -> Path:
    """Writes six views of each object, noise that the object and the azimuth determine. Returns the root."""
    for number, name in enumerate(objects):
        (root / name).mkdir(parents=True)
        for azimuth in AZIMUTHS:
            pixels = np.random.default_rng([number, azimuth]).integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"80-{azimuth:03d}.png")
    return root


def posed_args(root: Path, folder: Path, *overrides: str) -> list[str]:
    """Returns arguments of train.py for a tiny run on the objects in `root`. Later overrides win."""
    return [
        *("--config", str(ROOT / "config" / "folder.yaml"), *TINY_MODEL, "device=cpu", f"output_dir={folder}"),
        *("data.name=posed", f"data.root={root}", f"data.cache_dir={root.parent / 'cache'}", "data.image_size=8"),
        *("data.pose={polar}-{azimuth}", "data.holdout=0.5", "views.num_sources=2", "views.ray_octaves=2"),
        *(f"views.{part}={UNMOVED}" for part in ("source", "target", "probe")),
        *("training.batch_size=4", "training.epochs=4", "evaluation.knn.k=2", "evaluation.probe.epochs=1"),
        *("sampling.num_images=3", "sampling.num_sampling_steps=2", *overrides),
    ]


def posed_experiment(root: Path, *overrides: str) -> Any:
    """Returns the opened experiment of a tiny run on the objects in `root`."""
    _, path, *rest = posed_args(root, root / "run", *overrides)
    return open_experiment(load_config(path, rest))


def soda_without_zeros(experiment: Any) -> Any:
    """Returns the untrained model of an experiment, in which no weight starts at zero, so that z has an effect."""
    soda = initial_state(experiment).soda
    for weight in soda.decoder.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    return soda


def opened(objects: Path, **data: Any) -> tuple[Images, Images | None]:
    """Returns the splits of a folder of objects, at 8 px, as the keys of `data` say."""
    place = {"root": str(objects), "cache_dir": str(objects.parent / "cache")}
    return open_posed(Data(name="posed", image_size=8, **({"pose": "{polar}-{azimuth}"} | place | data)), 1)
