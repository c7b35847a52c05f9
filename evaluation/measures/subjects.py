"""The encoders, the model and the priors that measures are applied to, with their features and images."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from datasets.images import DatasetError, Images
from datasets.sources import open_unlabelled
from evaluation.codec import Codec, DrawLatents
from evaluation.encoders import Encode, baselines, encode_with
from evaluation.features import Features, Subset, extract_features, random_subset
from evaluation.measures.base import Inputs
from evaluation.protocols import config_protocols
from evaluation.quality import to_pixels
from evaluation.shapes import Shapes
from experiment.opening import Experiment
from utils.distributed.collectives import SharedError, all_equal, first_on_each_node
from utils.distributed.processes import local_world_size

logger = logging.getLogger(__name__)

NUM_SHAPES = 2000
NUM_RECONSTRUCTED, NUM_AVERAGED = 200, 2000  # images that are reconstructed, and those of which the mean is taken
OF_TEST_Z = "z of test images"

MakeView = Callable[[Tensor, range], Tensor]
"""Function (pixels (N, 3, H, W) uint8, their indices) -> views (N, 3, S, S) for an encoder."""


@dataclass(frozen=True)
class Subjects:
    """Encoders with names, of which one kind of features is measured.

    Attributes:
        encoders: {name: encoder}; each returns features of the name `feature`.
        feature: name of the features, such as "z" or "z@500".
        inputs: other images and networks that the user has given.
        codec: the model as an encoder and a decoder of images, for measures of reconstruction and generation.
        priors: functions that draw latents, by name.
    """

    experiment: Experiment
    encoders: Mapping[str, Encode]
    feature: str
    inputs: Inputs = field(default_factory=Inputs)
    codec: Codec | None = None
    priors: Mapping[str, DrawLatents] = field(default_factory=dict)

    @cached_property
    def train(self) -> dict[str, Tensor]:
        """Collective at the first use. Features (N, D) of the training images, without augmentation, by encoder."""
        return self.features(self.experiment.train)

    @cached_property
    def test(self) -> dict[str, Tensor]:
        """Collective at the first use. Features of the test images, as `train`."""
        assert self.experiment.test is not None, "the measure needs test images"
        return self.features(self.experiment.test)

    @property
    def train_labels(self) -> Tensor:
        """Labels (N,) of the training images, on the device."""
        assert self.experiment.train.labels is not None, "the measure needs labels"
        return self.experiment.train.labels.to(self.experiment.device)

    @property
    def test_labels(self) -> Tensor:
        """Labels (N,) of the test images, on the device."""
        assert self.experiment.test is not None and self.experiment.test.labels is not None, "the measure needs labels"
        return self.experiment.test.labels.to(self.experiment.device)

    @property
    def model(self) -> Codec:
        """The model, as an encoder and a decoder of images. The measure must be one of those that need it."""
        assert self.codec is not None, "the measure needs a decoder"
        return self.codec

    @property
    def sampling(self) -> str:
        """Settings of the sampler in one line, for a protocol."""
        sampling = self.experiment.config.sampling
        return f"{sampling.num_sampling_steps} DDIM steps, samples with {sampling}"

    @cached_property
    def num_samples(self) -> int:
        """Number of generated images of each prior: at most as many as there are test images to compare with."""
        test, wanted = self.experiment.test, self.inputs.num_samples
        limit = len(self.experiment.train if test is None else test)
        if wanted > limit:
            logger.info(
                "%d generated images per prior, not %d: there are no more real images to compare", limit, wanted
            )
        return min(wanted, limit)

    @cached_property
    def real(self) -> Subset | None:
        """As many test images as there are generated ones; None if there are no test images."""
        test, seed = self.experiment.test, self.experiment.config.seed
        return None if test is None else random_subset(test, self.num_samples, seed, "compared test images")

    @cached_property
    def generated(self) -> dict[str, Tensor]:
        """Collective at the first use. Generated images (N, 3, D, D) uint8 on the host, by the source of their z.

        The sources are the priors and, if there are test images, their own z. All have the same random x_T.
        """
        codec, count = self.model, self.num_samples
        latents = {name: draw(count, codec.seed) for name, draw in self.priors.items()}
        if self.real is not None:
            latents[OF_TEST_Z] = codec.test_z[self.real.indices.to(codec.test_z.device)]
        noise = codec.noise(count, "generated")
        return {name: to_pixels(codec.sample(z, noise)) for name, z in latents.items()}

    @cached_property
    def reconstructed(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Collective at the first use. Images (N, 3, D, D) in [-1, 1] on the device, and their reconstructions by name.

        The images are test images, or training images without a test split. "z and its x_T" decodes z and inverted
        x_T, "z and random x_T" is a sample, and "mean image" is the mean of the training images.
        """
        codec, experiment = self.model, self.experiment
        images = experiment.train if experiment.test is None else experiment.test
        chosen = random_subset(images, NUM_RECONSTRUCTED, experiment.config.seed, "reconstructed images")
        (pixels,) = chosen.batches([range(len(chosen))])
        sources, z = experiment.views.x_start(pixels).to(experiment.device), codec.encode(pixels)
        mean = self.images(random_subset(experiment.train, NUM_AVERAGED, experiment.config.seed, "mean image")).mean(0)
        found = {
            "z and its x_T": codec.decode(z, codec.invert(pixels, z)),
            "z and random x_T": codec.sample(z, codec.noise(len(z), "sample 0")),
            "mean image": mean.view_as(sources[0]).expand_as(sources) * 2 - 1,
        }
        return sources, {name: each.clamp(-1, 1) for name, each in found.items()}

    def images(self, images: Images | Subset, encode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Collective. Returns features (N, F) of real images at the decoder's size, float32 on the device.

        Args:
            encode: function pixels (N, 3, D, D) uint8 -> features; None: the values in [0, 1] themselves.
        """

        def extract(pixels: Tensor, indices: range) -> Features:
            small = self.experiment.views.x_start(pixels)
            return {"images": (small + 1).flatten(1) / 2 if encode is None else encode(to_pixels(small))}

        batch_size, device = self.experiment.config.evaluation.batch_size, self.experiment.device
        return extract_features(extract, images, batch_size, device)["images"]

    def features(self, images: Images | Subset, make_view: MakeView | None = None) -> dict[str, Tensor]:
        """Collective. Returns the features (N, D) float32 of `images` on the device, by encoder.

        Raises SharedError if a feature is not finite.

        Args:
            make_view: makes the views that are encoded; None: views without augmentation.
        """

        def encode(pixels: Tensor, indices: range) -> Features:
            views = make_view(pixels, indices) if make_view else self.experiment.views.evaluation(pixels)
            return {name: encoder(views, indices)[self.feature].float() for name, encoder in self.encoders.items()}

        batch_size, device = self.experiment.config.evaluation.batch_size, self.experiment.device
        found = extract_features(encode, images, batch_size, device)
        features = {name: found[name] for name in self.encoders}
        for name, each in features.items():
            if not each.isfinite().all():
                raise SharedError(
                    f"{self.feature} of the encoder {name!r} is not finite, so it cannot be measured: use a checkpoint "
                    "of a run that has not diverged"
                )
        return features


def subjects_of(codec: Codec, inputs: Inputs, priors: Mapping[str, DrawLatents]) -> Subjects:
    """Collective. Returns the trained encoder of the codec, the untrained one, and the raw pixels, as `baselines` does.

    The features are those that `evaluation.features` names, at the timestep of the codec.
    """
    experiment = codec.experiment
    if codec.timestep is not None:
        judged = experiment.config.evaluation.model_copy(update={"timesteps": [codec.timestep]})
        experiment = replace(experiment, config=experiment.config.model_copy(update={"evaluation": judged}))
    encoders = {"trained": encode_with(experiment, codec.soda), **baselines(experiment)}
    return Subjects(experiment, encoders, config_protocols(experiment.config)[0].feature_name, inputs, codec, priors)


def open_others(folder: Path | None, experiment: Experiment) -> tuple[str, Images]:
    """Collective. Returns a name and the images of `folder`, decoded as the experiment's; None: synthetic shapes.

    Raises DatasetError if the folder has no images that can be used, or if they differ between ranks.
    """
    config = experiment.config
    if folder is None:
        return "synthetic shapes", Shapes(NUM_SHAPES, config.encoder_size, config.seed)
    if not folder.is_dir():
        raise DatasetError(f"no folder {folder}: set --others to a folder with images")
    grey_bits = experiment.info.grey_bits
    images = first_on_each_node(lambda: open_unlabelled(folder, config.data, local_world_size(), grey_bits))
    if not all_equal(images.digest()):
        raise DatasetError(f"the machines hold different images in {folder}: copy the same images to all machines")
    return folder.resolve().name, images


def standardized(features: Tensor, reference: Tensor) -> Tensor:
    """Standardises features (N, D) by mean and standard deviation of reference features (M, D).

    Features that are constant in the reference become 0.
    """
    std, mean = torch.std_mean(reference, dim=0, correction=0)
    # The standard deviation of a constant feature may be a rounding error instead of 0.
    varies = std > 10 * torch.finfo(std.dtype).eps * mean.abs()
    return (features - mean) * torch.where(varies, 1 / std, 0)
