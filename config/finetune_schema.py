"""Schema of the configs of finetune.py. Keys that it shares with train.py are in schema.py."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from config.consistency import check_images_and_encoder, check_noise_schedule, check_rates
from config.schema import (
    Evaluating,
    Fraction,
    Pair,
    PathText,
    Positive,
    Rates,
    RunConfig,
    Running,
    Section,
    View,
    key,
)
from model.names import Method


class Classifier(Section):
    """Layers on top of the encoder."""

    features: Literal["pooled", "z"] = key(
        "pooled", "features that are classified; pooled: the input of the encoder's last layer; z: the latent"
    )
    batch_norm: bool = key(
        True, "normalise the features by BatchNorm before the linear layer; suits features of any scale"
    )


class WeakView(View):
    """Augmentation of the labelled images in supervised training. By default, a flip."""

    crop_flip_probability: Fraction = key(
        1.0, "probability of crop and flip: a random crop, then a horizontal flip with flip_probability"
    )
    crop_scale: Pair = key([1.0, 1.0], "[lowest, highest] area of the random crop, as a fraction of the image's area")
    crop_ratio: Pair = key([1.0, 1.0], "[lowest, highest] aspect ratio (width / height) of the random crop")
    randaugment_probability: Fraction = key(0.0, "probability of applying RandAugment to an image")


class StrongView(WeakView):
    """Augmentation of all images in training with pseudo-labels. By default, a flip, and RandAugment for each image."""

    randaugment_probability: Fraction = key(1.0, "probability of applying RandAugment to an image")


class FinetuneViews(Section):
    """Augmentations."""

    weak: WeakView = WeakView()
    strong: StrongView = StrongView()


class LaplaceNet(Section):
    """Settings of LaplaceNet (Sellars et al., arXiv 2106.04527). The other methods ignore them."""

    labelled_batch_size: int = key(
        50, "images of each batch that are labelled; the others have pseudo-labels; less than training.batch_size", ge=1
    )
    supervised_epochs: int = key(
        10,
        "first epochs, in which only labelled images are used, with views.weak; 0: there are none",
        ge=0,
    )
    num_views: int = key(3, "number of strong views of each image in a step; the loss is their mean", ge=1, le=64)
    mixup_alpha: float = key(
        1.0,
        "parameter alpha of mixup: images and labels are mixed in pairs, with a weight from Beta(alpha, alpha); 0: no "
        "mixup",
        ge=0,
    )
    k: int = key(50, "nearest neighbours of each training image in the graph", ge=1)
    alpha: Annotated[float, Field(gt=0, lt=1)] = key(
        0.99, "weight of the neighbours in the propagation of labels, against the given labels"
    )
    tolerance: Positive = key(1e-3, "relative residual at which the conjugate gradients of a class stop")
    max_iterations: int = key(30, "largest number of iterations of the conjugate gradients of a class", ge=1)
    alignment_rounds: int = key(
        100,
        "rounds that scale the classes' pseudo-labels, by at most 1 % each, towards the class frequencies of the "
        "labelled images; 0: no alignment",
        ge=0,
    )


class FinetuneOptimizer(Rates):
    """Settings of SGD with Nesterov momentum. The learning rate is not scaled by the batch size."""

    lr: Positive = key(0.03, "learning rate of the classifier's layers on top of the encoder, after the warm-up")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = key(
        1.0,
        "factor of the learning rate from each group of the encoder's layers to the group before it, from the last to "
        "the first; 1: all layers have the same rate; 0.5 suits an encoder that starts from good weights",
    )
    momentum: Annotated[float, Field(gt=0, lt=1)] = key(0.9, "Nesterov momentum")
    weight_decay: float = key(5e-4, "weight decay, applied to all trained parameters; 0: none", ge=0)
    warmup_epochs: float = key(
        0.0,
        "epochs over which the learning rates rise linearly, step by step; may be a fraction; 0: no warm-up",
        ge=0,
        le=1e6,
    )
    schedule: Literal["constant", "cosine"] = key(
        "cosine", "learning rates after the warm-up: constant, or a cosine that reaches zero after the last step"
    )


class FinetuneTraining(Running):
    """Length of the training and batches, and the keys of `Running`."""

    epochs: int = key(
        200,
        "number of epochs, each of floor(training images / batch_size) steps, but at least one; images without labels, "
        "and those of `unlabelled`, count as well, so an epoch is equally long for all methods",
        ge=1,
    )
    batch_size: int = key(
        100,
        "images per training step, over all processes; if there are fewer labelled images, they repeat",
        ge=4,
        multiple_of=4,
    )


class FinetuneEvaluation(Evaluating):
    """Evaluation of the EMA classifier on the test images."""

    every: int = key(
        10,
        "epochs between evaluations of the EMA classifier; there is also one after the last epoch",
        run=True,
        ge=1,
    )


class FinetuneConfig(RunConfig):
    """The whole config of finetune.py."""

    program = "finetune.py"
    marker = "method"

    method: Method = key(
        "finetune",
        "training of the classifier; probe: the encoder is frozen; finetune: all layers are trained on the labelled "
        "images; laplacenet: also on pseudo-labels of the other training images, by propagation over a graph",
    )
    num_labels: int | None = key(
        None,
        "number of labelled training images, the same number of each class (or one more); null: all training images "
        "that have a label",
        ge=1,
    )
    label_split: int = key(
        0, "number of the random draw of the labelled images; the same for all methods and values of `seed`", ge=0
    )
    labelled: PathText = key(
        "",
        "text file that names the labelled images, one per line: the path of a file relative to data.root (the folder "
        "of the training split may be left out), or, if the "
        "data set has no files, the index of an image in the training split; the name of its class may follow; "
        "replaces num_labels; empty: the images are drawn",
        run=True,
    )
    unlabelled: PathText = key(
        "",
        "folder of further training images without labels; all methods count them in an epoch, and laplacenet trains "
        "on them; empty: none",
        run=True,
    )
    output_dir: PathText = key(
        "",
        "run folder, for checkpoints, logs and results; empty: a folder named by the method, the number of labels, the "
        "split and, without encoder.weights, `from_scratch`, in runs/<name of the config file>",
        run=True,
    )
    classifier: Classifier = Classifier()
    views: FinetuneViews = FinetuneViews()
    laplacenet: LaplaceNet = LaplaceNet()
    optimizer: FinetuneOptimizer = FinetuneOptimizer()
    training: FinetuneTraining = FinetuneTraining()
    evaluation: FinetuneEvaluation = FinetuneEvaluation()

    @model_validator(mode="after")
    def _consistent(self) -> "FinetuneConfig":
        check_images_and_encoder(self)
        check_noise_schedule(self.diffusion)
        check_rates(self)
        if self.data.has_cameras:
            raise ValueError(
                "data.name=posed is for train.py, because classifiers use no cameras: set data.name=folder"
            )
        if self.labelled and self.num_labels is not None:
            raise ValueError("labelled and num_labels exclude each other: set num_labels=null, or labelled= (empty)")
        if self.encoder.frozen:
            raise ValueError("encoder.frozen is for train.py: set method=probe to keep the encoder as it is")
        if self.method == "laplacenet" and self.laplacenet.supervised_epochs >= self.training.epochs:
            raise ValueError(
                f"laplacenet.supervised_epochs {self.laplacenet.supervised_epochs} leaves no epoch for pseudo-labels: "
                f"set it to less than training.epochs, {self.training.epochs}, or use method=finetune"
            )
        if self.method == "laplacenet" and self.laplacenet.labelled_batch_size >= self.training.batch_size:
            raise ValueError(
                f"laplacenet.labelled_batch_size {self.laplacenet.labelled_batch_size} leaves no room for unlabelled "
                f"images in training.batch_size {self.training.batch_size}: lower it"
            )
        return self

    @property
    def training_images(self) -> str:
        """Keys that name the training images, with their values, for messages."""
        return f"data.root ({self.data.root}) or unlabelled ({self.unlabelled or 'empty'})"

    @property
    def run_name(self) -> str:
        """Folder of the run inside that of the config file, such as probe_100_labels_split_0_from_scratch."""
        count = "all" if self.num_labels is None else str(self.num_labels)
        labels = "given_labels" if self.labelled else f"{count}_labels_split_{self.label_split}"
        return f"{self.method}_{labels}{'' if self.encoder.weights else '_from_scratch'}"
