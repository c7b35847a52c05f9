"""Opening of a config: its images, views, loader, diffusion and device."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from config.errors import ConfigError
from config.schema import Config, Data, RunConfig
from datasets.decoding import Rules, rules_of
from datasets.images import DatasetError, Images, Statistics, StoredImages
from datasets.loader import Loader
from datasets.sources import DatasetInfo, build_dataset
from datasets.views import Views
from experiment.threads import choose_num_threads, training_work
from model.diffusion import GaussianDiffusion
from utils.device import choose_amp_dtype, choose_device
from utils.distributed.collectives import all_equal, all_gather_object, first_on_each_node, open_tensor_group
from utils.distributed.processes import local_world_size
from utils.randomness import generator


@dataclass(frozen=True)
class Experiment:
    """Everything that training and evaluation read, but do not change.

    Attributes:
        amp_dtype: number format of autocast; None: float32.
        test: test images; None if there are none, or if the images of a folder have no labels.
        data_digest: digest of the training images, their labels, the names of their classes, and their cameras.
    """

    config: Config
    device: torch.device
    amp_dtype: torch.dtype | None
    train: Images
    test: Images | None
    data_digest: str
    info: DatasetInfo
    views: Views
    loader: Loader
    diffusion: GaussianDiffusion

    @property
    def has_test_labels(self) -> bool:
        """True if there are test images with labels, by which encoders can be judged."""
        return self.test is not None and self.test.labels is not None

    @property
    def steps_per_epoch(self) -> int:
        """Number of training steps of an epoch."""
        return self.loader.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Number of training steps of the complete run."""
        return self.config.training.epochs * self.loader.steps_per_epoch

    @property
    def digests(self) -> list[str | None]:
        """Digests of the training images and of the test images; None: there are no test images."""
        return [self.data_digest, self.test.digest() if self.test else None]

    @property
    def rules(self) -> Rules:
        """Rules by which image files are decoded."""
        return rules_of(self.config.data, self.info.grey_bits)


def open_experiment(config: Config, statistics: Statistics | None = None, grey_bits: int | None = None) -> Experiment:
    """Collective. Loads the images and returns the experiment. Call `check_can_train` before training.

    Args:
        statistics: mean and standard deviation of the channels, which normalise the views; None: those of the images.
        grey_bits: range by which greys are decoded (see `Rules.grey_bits`); None: that of the images.

    Raises:
        ConfigError: the ranks would compute on different types of device or in different number formats.
        DatasetError: the images cannot be used, or differ between ranks.
    """
    device, amp_dtype = open_device(config, partial(training_work, config))
    train, test, info = open_images(config.data, statistics, grey_bits)
    data_digest = train.digest()
    train, test = to_gpu_if_small(train, device), test and to_gpu_if_small(test, device)
    return Experiment(
        config=config,
        device=device,
        amp_dtype=amp_dtype,
        train=train,
        test=test,
        data_digest=data_digest,
        info=info,
        views=Views(
            config.views,
            encoder_size=config.encoder_size,
            decoder_size=config.decoder_size,
            stored_size=config.data.stored_size,
            mean=info.mean,
            std=info.std,
            device=device,
        ),
        loader=Loader(
            len(train),
            min(config.training.batch_size, len(train)),
            lambda epoch: generator(config.seed, "order", epoch),
        ),
        diffusion=GaussianDiffusion(**config.diffusion.model_dump(), device=device),
    )


def open_images(
    data: Data, statistics: Statistics | None, grey_bits: int | None
) -> tuple[Images, Images | None, DatasetInfo]:
    """Collective. Returns (training split, test split or None, info) of a data set, the same on all ranks.

    Args:
        statistics, grey_bits: as in `open_experiment`.

    Raises DatasetError if the images cannot be used, or differ between ranks.
    """
    train, test, info = first_on_each_node(lambda: build_dataset(data, local_world_size(), grey_bits))
    if statistics is not None:
        info = replace(info, mean=statistics[0], std=statistics[1])
    if not all_equal((train.digest(), test and test.digest())):
        raise DatasetError(f"the machines hold different images in {data.root}: copy the same images to all machines")
    return train, test, info


def check_can_train(experiment: Experiment) -> None:
    """Raises DatasetError if there are too few images for a batch, or for the evaluations during training."""
    count = len(experiment.train)
    if count < experiment.config.training.batch_size:
        raise DatasetError(f"{count} training images are fewer than a batch: add images, or lower training.batch_size")
    if experiment.has_test_labels:
        check_neighbours(experiment.config, experiment.train)


def check_neighbours(config: Config, train: Images) -> None:
    """Raises DatasetError if k-NN as the config sets it needs more neighbours than there are training images."""
    k = config.evaluation.knn.k
    if len(train) < k:
        raise DatasetError(
            f"evaluation.knn.k {k} is more than the {len(train)} training images: lower evaluation.knn.k"
        )


def open_device(config: RunConfig, work: Callable[[], float]) -> tuple[torch.device, torch.dtype | None]:
    """Collective. Returns (device, number format of autocast) of this rank and opens the tensor group.

    On a CPU, also chooses the number of threads.

    Args:
        work: function that returns the FLOPs of a forward pass of this rank.

    Raises ConfigError if the type of device or the number format is not the same on all ranks.
    """
    device = choose_device(config.device)
    amp_dtype = choose_amp_dtype(config.training.use_amp, device)
    arithmetic = [f"{kind} in {dtype or 'float32'}" for kind, dtype in all_gather_object((device.type, amp_dtype))]
    if len(set(arithmetic)) > 1:
        raise ConfigError(
            f"the processes compute differently ({', '.join(arithmetic)}): "
            "set device and training.use_amp to values that all processes support"
        )
    open_tensor_group(config.distributed.backend, device)
    if device.type == "cpu":
        choose_num_threads(work)
    return device, amp_dtype


def to_gpu_if_small(images: Images, device: torch.device) -> Images:
    """Returns the images in the GPU's memory if they fill at most a quarter of its free memory, else unchanged.

    Streamed images are always returned unchanged.
    """
    if device.type != "cuda" or not isinstance(images, StoredImages):
        return images
    return images if images.pixels.numel() > torch.cuda.mem_get_info(device)[0] / 4 else images.to(device)
