"""Opening of a config of finetune.py: its images, the labelled ones among them, views and device."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from config.errors import ConfigError
from config.finetune_schema import FinetuneConfig
from config.schema import Views as ViewsConfig
from datasets.images import DatasetError, Images, JoinedImages, Statistics
from datasets.sources import DatasetInfo, open_unlabelled
from datasets.views import Views
from experiment.opening import open_device, open_images, to_gpu_if_small
from model.build import module_flops
from transfer.classifier import build_classifier
from transfer.draws import Draws
from transfer.labelled import choose_labelled
from transfer.methods import METHODS, Method
from utils.distributed.collectives import all_equal, first_on_each_node
from utils.distributed.processes import local_world_size, world_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """Everything that training and evaluation of a classifier read, but do not change.

    Attributes:
        amp_dtype: number format of autocast; None: float32.
        train: training images: those of the data set, then those of `unlabelled`.
        data_digest: digest of the training images, their labels and the names of their classes.
        labels: (N,) int64, true labels of the training images; -1: not known.
        labelled: (n,) int64, indices of the images whose labels training may use.
        draws: indices of the images of each step.
    """

    config: FinetuneConfig
    device: torch.device
    amp_dtype: torch.dtype | None
    train: Images
    test: Images
    data_digest: str
    info: DatasetInfo
    views: Views
    labels: Tensor
    labelled: Tensor
    method: Method
    draws: Draws

    @property
    def steps_per_epoch(self) -> int:
        """Number of training steps of an epoch."""
        return self.draws.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Number of training steps of the complete run."""
        return self.config.training.epochs * self.steps_per_epoch

    @property
    def given_labels(self) -> Tensor:
        """Labels that training may use, (N,) int64; -1 for all other images."""
        given = torch.full_like(self.labels, -1)
        given[self.labelled] = self.labels[self.labelled]
        return given


def open_task(config: FinetuneConfig, statistics: Statistics | None = None, grey_bits: int | None = None) -> Task:
    """Collective. Loads the images, chooses the labelled ones, and returns the task.

    Args:
        statistics: mean and standard deviation of the channels, which normalise the views; None: those of the images.
        grey_bits: range by which greys are decoded (see `Rules.grey_bits`); None: that of the data set's images, or of
            the images in `unlabelled` if the data set has no greys of more than 8 bits.

    Raises:
        ConfigError: the labels cannot be chosen as the config asks, or the ranks would compute differently.
        DatasetError: the images cannot be used, have no labels or no test images, or differ between ranks.
    """
    device, amp_dtype = open_device(config, partial(training_work, config))
    train, test, info = open_images(config.data, statistics, grey_bits)
    if test is None or train.labels is None:
        raise DatasetError(
            f"{config.data.root} has no test images with labels: put images into train/CLASS and test/CLASS, or, with "
            "one folder per class, set data.holdout=0.1"
        )
    labelled, data_digest = choose_labelled(config, train), train.digest()
    train, test = to_gpu_if_small(train, device), to_gpu_if_small(test, device)
    if not all_equal(labelled.tolist()):
        raise ConfigError("the processes read different files of labelled images: give all of them the same file")
    method = METHODS[config.method](config)
    if config.unlabelled:
        more = _open_unlabelled(config, info.grey_bits)
        info = replace(info, grey_bits=info.grey_bits or more.grey_bits)
        train = JoinedImages(train, to_gpu_if_small(more, device) if method.uses_unlabelled else more)
        data_digest = train.digest()
    assert train.labels is not None
    unlabelled = torch.ones(len(train), dtype=torch.bool).index_fill(0, labelled, False).nonzero()[:, 0]
    logger.info("%d labelled and %d other training images", len(labelled), len(unlabelled))
    if method.uses_unlabelled and len(unlabelled) == 0:
        raise ConfigError(f"method={config.method} needs images without labels: lower num_labels, or set unlabelled")
    return Task(
        config=config,
        device=device,
        amp_dtype=amp_dtype,
        train=train,
        test=test,
        data_digest=data_digest,
        info=info,
        views=Views(
            ViewsConfig(),  # its augmentations are not used: each view names its own
            encoder_size=config.encoder_size,
            decoder_size=config.encoder_size,
            stored_size=config.data.stored_size,
            mean=info.mean,
            std=info.std,
            device=device,
        ),
        labels=train.labels,
        labelled=labelled,
        method=method,
        draws=Draws(config, method, labelled, unlabelled),
    )


def _open_unlabelled(config: FinetuneConfig, grey_bits: int | None) -> Images:
    """Collective. Opens the images in `unlabelled`. Raises DatasetError."""
    folder = Path(config.unlabelled)
    if config.data.root and Path(config.data.root).resolve().is_relative_to(folder.resolve()):
        text = "`unlabelled` (%s) contains data.root: all of its images, also the test images, are read without labels"
        logger.info(text, folder)
    images = first_on_each_node(lambda: open_unlabelled(folder, config.data, local_world_size(), grey_bits))
    if not all_equal(images.digest()):
        raise DatasetError(f"the machines hold different images in {folder}: copy the same images to all machines")
    return images


def training_work(config: FinetuneConfig) -> float:
    """Returns the FLOPs of a forward pass of one rank in training."""
    with torch.device("meta"):
        classifier = build_classifier(config, num_classes=2)
    num_views = config.laplacenet.num_views if config.method == "laplacenet" else 1
    share = config.training.batch_size * num_views // world_size()
    return share * module_flops(classifier, torch.zeros(1, 3, config.encoder_size, config.encoder_size, device="meta"))
