"""Classes that a classifier of finetune.py gives to the images of a folder."""

import csv
import io
import logging
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from analysis.feature_file import NamedImages, encode_named, images_of_listing
from analysis.image_encoder import ImageEncoder
from config.errors import ConfigError
from config.finetune_schema import FinetuneConfig
from config.keys import differences
from config.reading import parse
from datasets.listing import Listing
from datasets.walking import all_images
from experiment.opening import open_device
from experiment.trained import check_weights
from model.encoder import Encoder
from transfer.classifier import Classifier, build_classifier
from transfer.opening import training_work
from utils.device import compute_exactly
from utils.distributed.collectives import all_equal
from utils.files import check_writable
from utils.run_folder.checkpoint import newest_checkpoint
from utils.text import join_names

logger = logging.getLogger(__name__)


class _Logits(Encoder):
    """A classifier with the interface of an encoder: its features are the logits."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self._classifier = classifier

    def features(self, x_source: Tensor, timesteps: Tensor | None = None) -> dict[str, Tensor]:
        """Returns {"logits": (N, num_classes)} for normalised images (N, 3, S, S)."""
        return {"logits": self._classifier(x_source)}


def _name_of(folder: Path) -> str:
    """Returns a file name for a folder: its path relative to the working folder, with -- between the folders.

    A folder outside the working folder, and the working folder, are named by their absolute paths.
    """
    path = folder.absolute()
    if path.is_relative_to(Path.cwd()) and path != Path.cwd():
        path = path.relative_to(Path.cwd())
    name = "--".join(part for part in path.parts if part != path.anchor) or "root"
    return os.fsdecode(os.fsencode(name)[-200:])


@dataclass(frozen=True)
class Prediction:
    """The EMA classifier of a run's newest checkpoint, and the images that it is to classify.

    Attributes:
        path: CSV file of the result.
    """

    path: Path
    _classes: list[str]
    _model: ImageEncoder
    _images: NamedImages
    _device: torch.device
    _amp_dtype: torch.dtype | None
    _batch_size: int

    def table(self) -> tuple[str, Counter[str]]:
        """Collective. Classifies the images.

        Returns the text of the CSV file, with a line for each image: its path, the class and its probability; and the
        number of images of each class. Raises UnreadableError, DatasetError and OutOfMemoryError.
        """
        model = self._model.eval().to(self._device)
        features, images = encode_named(model, self._images, self._batch_size, self._amp_dtype)
        probabilities, labels = features["logits"].softmax(dim=1).max(dim=1)
        names = [self._classes[label] for label in labels.tolist()]
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(("file", "class", "probability"))
        files = [name.encode(errors="backslashreplace").decode() for name in images.names]  # maybe not valid text
        writer.writerows(zip(files, names, (f"{each:.4f}" for each in probabilities.tolist()), strict=True))
        return lines.getvalue(), Counter(names)


def open_prediction(config: FinetuneConfig, folder: Path) -> Prediction:
    """Collective. Returns the newest checkpoint of a run with all images below `folder`, as a Prediction.

    The run keys of `data`, `device`, `training.use_amp` and `evaluation.batch_size` are those of `config`. All other
    keys that define the images and the classifier are those of the checkpoint.

    Raises ConfigError if the run has no checkpoint, or if the ranks read different ones; CheckpointError and
    DatasetError.
    """
    run = Path(config.output_dir)
    found = newest_checkpoint(run / "checkpoints")
    if found is None:
        raise ConfigError(f"{run} has no checkpoint: train first, by the same command without --predict")
    checkpoint, contents = found
    trained = parse(FinetuneConfig, contents["config"], f"the config in {checkpoint}")
    if not all_equal(contents["sha256"]):
        raise ConfigError(
            f"the processes read different checkpoints from {run}: set output_dir to shared storage, or, if the run is "
            "still training, run the command again"
        )
    ignored = differences(trained, config, run=False)
    ignored.pop("training.use_amp", None)
    if ignored:
        logger.info("%s has other values of %s: its own are used", checkpoint, join_names(list(ignored), 10))
    changed = differences(trained, config, run=True, prefixes=("data.",))
    given = {key.removeprefix("data."): new for key, (_, new) in changed.items()}
    trained = trained.model_copy(update={"data": trained.data.model_copy(update=given)})
    named = images_of_listing(Listing(folder, all_images(folder), None, []), trained, contents["grey_bits"])
    path = run / "predictions" / f"{_name_of(folder)}.csv"
    check_writable(path)

    device, amp_dtype = open_device(config, partial(training_work, trained))
    compute_exactly()
    classes = contents["classes"]
    classifier = build_classifier(trained, len(classes))
    check_weights(contents["ema"]["model"], classifier)
    classifier.load_state_dict(contents["ema"]["model"])
    mean, std = (tuple(values) for values in contents["statistics"])
    model = ImageEncoder(_Logits(classifier), mean, std, trained.encoder_size, trained.data.stored_size)
    return Prediction(path, classes, model, named, device, amp_dtype, config.evaluation.batch_size)
