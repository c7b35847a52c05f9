"""Schema of the config: type, default, range and meaning of every key.

There are two kinds of keys. An *experiment* key defines the result of the run. It must have the same value when the run
is resumed. A *run* key (paths, intervals, device, ...) may change whenever the run is started again.
"""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from config.consistency import check_consistency
from config.pose_pattern import check_transforms_file, is_transforms_file, name_pattern
from model.names import Architecture, Initialization, Modulation, Prediction, Schedule, Stem, TimestepSampling
from model.sizes import num_sections

Fraction = Annotated[float, Field(ge=0, le=1)]  # also a probability
Positive = Annotated[float, Field(gt=0)]
Channels = Annotated[int, Field(ge=4, multiple_of=4)]


# Python represents bytes of a path that are not text as surrogates. A config, which is UTF-8, cannot hold them.
def _only_text(path: Any) -> Any:
    if isinstance(path, str):
        try:
            path.encode()
            os.fsencode(path)
        except UnicodeEncodeError:
            encoding, shown = sys.getfilesystemencoding(), ascii(path)
            hint = "" if encoding == "utf-8" else ", or set PYTHONUTF8=1"
            raise ValueError(f"{shown} is not a path in {encoding}: choose a path in ASCII letters{hint}") from None
    return path


# A path may start with ~. It must not contain a null character.
def _path(text: str) -> str:
    if any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        raise ValueError("a name in a path has at most 255 bytes: choose a shorter one")
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        user = text.split("/")[0]
        raise ValueError(f"{user} has no home folder: write the path in full, or ./{text} if it is a name") from None


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError("the path is empty: write a path; . is the current folder")
    return text


PathText = Annotated[str, Field(pattern=r"^[^\x00]*$"), BeforeValidator(_only_text), AfterValidator(_path)]
GivenPath = Annotated[PathText, AfterValidator(_not_empty)]
Color = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]


def key(default: Any, meaning: str, *, run: bool = False, **bounds: Any) -> Any:
    """Returns the pydantic field of one documented key.

    Args:
        run: True for a run key, which may change when a run is resumed.
        bounds: limits of the value, as arguments of pydantic's `Field`.
    """
    return Field(default, description=meaning, json_schema_extra={"run": run}, **bounds)


class Section(BaseModel):
    """Base class of the sections of a config. Unknown keys, wrong types and later changes are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    all_run: ClassVar[bool] = False  # True: all keys of the section are run keys, even those without run=True

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return {} if value is None else value  # YAML gives None for a section name with nothing below it


class Data(Section):
    """The data set, and the decoding of its images."""

    name: Literal["digits", "fashion_mnist", "cifar10", "cifar100", "tiny", "folder", "posed"] = key(
        "cifar10",
        "data set; `tiny`: Tiny-ImageNet; `folder`: your own images; `posed`: photographs of objects from known "
        "cameras, so that source and target views are different photographs of one object",
    )
    root: GivenPath = key(
        "data",
        "folder of the data set; cifar10, cifar100 and fashion_mnist are downloaded to it if they are missing; "
        "digits does not use it",
        run=True,
    )
    cache_dir: GivenPath = key(
        "data/cache",
        "folder for the decoded images of `tiny`, `folder` and `posed`; if each machine has its own copy of the "
        "images, a folder on its own storage",
        run=True,
    )
    image_size: int = key(
        32,
        "height and width in pixels of the views that the encoder receives, and of those that the decoder denoises, "
        "unless decoder.image_size is set; images are resized to this size, unless data.stored_size is set",
        ge=4,
        le=4096,
    )
    stored_size: int | None = key(
        None,
        "height and width in pixels of the squares from which crops are taken; each crop is resized once, with "
        "antialiasing, to data.image_size (source views) or decoder.image_size (target views), as is usual for "
        "photographs; null: data.image_size, which suits small images",
        ge=4,
        le=4096,
    )
    background: Color = key(
        [255, 255, 255],
        "colour behind transparent pixels of image files: [red, green, blue], each from 0 to 255; the default is white",
    )
    unreadable: Literal["error", "skip"] = key(
        "error",
        "image files that cannot be read; error: list all of them and stop; skip: leave them out and log how many they "
        "are; a file that the system does not deliver is always an error",
        run=True,
    )
    max_megapixels: Positive = key(
        250.0,
        "image files with more million pixels than this count as unreadable; while a thread decodes an image, it takes "
        "about 4 to 6 bytes of memory per pixel",
        run=True,
        le=10000,
    )
    stream: bool | None = key(
        None,
        "true: stream the files of `tiny`, `folder` and `posed`, which means decode them each time they are used; "
        "false: decode them once, to data.cache_dir; null: stream only if the decoded images would fill more than half "
        "of the memory",
        run=True,
    )
    num_workers: int | None = key(
        None,
        "number of threads per process that decode image files; null: one per core, but while images are streamed, the "
        "cores are divided among the processes of a machine",
        run=True,
        ge=1,
        le=1024,
    )
    holdout: float = key(
        0.0,
        "fraction of each class of `folder` that is held out as the test split if there is none, or fraction of the "
        "objects or views of `posed` (data.split); they are chosen by a digest of their paths, so runs with different "
        "seeds have the same test split; 0: none",
        ge=0,
        lt=1,
    )
    labels: PathText = key(
        "",
        "text file that gives the path of each image of `folder`, relative to data.root, and its label, or two or more "
        "columns of 0 and 1; the file is searched in the current folder, then in data.root; empty: the class folders "
        "give the labels",
        run=True,
    )

    pose: str = key(
        "",
        "cameras of `posed`: a pattern of the file names without ending, with {azimuth} or {yaw} and {polar} (0: from "
        "above, 90: from the side) or {pitch} (90 - polar), in degrees, where azimuths rise counter-clockwise, seen "
        "from above, and * stands for any text (a number directly after it has no sign); or `eth80` or `cars3d`, whose "
        "patterns are known; or the name of the .json file in each object's folder that lists its cameras as "
        "NeRF-synthetic does",
    )
    focal: Positive = key(
        1.5,
        "focal length of the cameras of `posed`, in widths of the square image; a .json file of cameras gives its own",
    )
    split: Literal["objects", "views"] = key(
        "objects",
        "part of `posed` that data.holdout holds out; objects: whole objects, from each class; views: views of each "
        "object, which keeps at least two training views",
    )

    @field_validator("pose")
    @classmethod
    def _pose(cls, pose: str) -> str:
        if is_transforms_file(pose):
            check_transforms_file(pose)
        elif pose:
            name_pattern(pose)
        return pose

    @property
    def is_of_files(self) -> bool:
        """True if the images are files in folders of the user, which are decoded and cached."""
        return self.name in ("tiny", "folder", "posed")

    @property
    def has_cameras(self) -> bool:
        """True if each image of the data set has a camera, which encoder and decoder see as rays."""
        return self.name == "posed"

    @property
    def kept_size(self) -> int:
        """Height and width in pixels of the images in memory, in the cache and in batches."""
        return self.stored_size or self.image_size


class View(Section):
    """Augmentation of a view: crop and flip, shift, RandAugment, colours, blur, affine transform, cutout, in order."""

    crop_flip_probability: Fraction = key(
        0.95, "probability of crop and flip: a random crop, then a horizontal flip with flip_probability"
    )
    crop_scale: Pair = key([0.08, 1.0], "[lowest, highest] area of the random crop, as a fraction of the image's area")
    crop_ratio: Pair = key([3 / 4, 4 / 3], "[lowest, highest] aspect ratio (width / height) of the random crop")
    flip_probability: Fraction = key(
        0.5, "probability of a horizontal flip of an image that is cropped; other images are never flipped"
    )
    shift_pixels: int = key(
        0,
        "largest shift of a view along each axis in pixels, in either direction, after crop and flip; pixels from "
        "outside are reflections of those inside, as in a random crop after padding by reflection; 0: no shift",
        ge=0,
    )
    randaugment_probability: Fraction = key(0.65, "probability of applying RandAugment to an image")
    randaugment_num_ops: int = key(2, "number of RandAugment operations per image", ge=1)
    randaugment_magnitude: int = key(
        9, "strength of the RandAugment operations, from 0 (weakest) to 30 (strongest)", ge=0, le=30
    )
    color_jitter_probability: Fraction = key(0.0, "probability of applying colour jitter to an image")
    color_jitter: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=4, max_length=4)] = key(
        [0.4, 0.4, 0.4, 0.1],
        "strengths s of colour jitter, for brightness, contrast, saturation and hue; the first three properties are "
        "each multiplied by a random factor from max(0, 1 - s) to 1 + s; the hue turns by up to s of the colour circle "
        "(s at most 0.5)",
    )
    grayscale_probability: Fraction = key(0.0, "probability of converting an image to greyscale")
    blur_probability: Fraction = key(
        0.0,
        "probability of blurring an image by a Gaussian kernel; the width of the kernel is a tenth of the image size, "
        "made odd, but at least 3 pixels",
    )
    blur_sigma: Pair = key([0.1, 2.0], "[lowest, highest] standard deviation of the Gaussian blur in pixels")
    affine_probability: Fraction = key(
        0.0, "probability of applying a random affine transform (rotation, shift, zoom, shear) to an image"
    )
    affine_degrees: float = key(
        0.0, "largest rotation of the affine transform in degrees, in either direction", ge=0, le=180
    )
    affine_translate: Fraction = key(
        0.0, "largest shift of the affine transform along each axis, as a fraction of the image size"
    )
    affine_scale: Pair = key([1.0, 1.0], "[lowest, highest] zoom factor of the affine transform")
    affine_shear: float = key(
        0.0, "largest horizontal shear of the affine transform in degrees, in either direction", ge=0, lt=90
    )
    cutout: Fraction = key(
        0.0,
        "largest side of a grey square that is drawn over the view, as a fraction of the image size; the side is "
        "uniform between 0 and this, and the centre is anywhere in the view; 0: no square",
    )

    def __str__(self) -> str:
        """Returns a short description for tables.

        Two views that augment differently have different descriptions. Numbers are given to six digits.
        """
        parts = []
        if self.crop_flip_probability:
            (low, high), (narrow, wide) = self.crop_scale, self.crop_ratio
            parts.append(f"crop {low:g}-{high:g} ratio {narrow:g}-{wide:g} flip {self.flip_probability:g}")
            parts[-1] += f" (p={self.crop_flip_probability:g})"
        if self.shift_pixels:
            parts.append(f"shift {self.shift_pixels} px")
        if self.randaugment_probability:
            strength = f"{self.randaugment_num_ops}x{self.randaugment_magnitude}"
            parts.append(f"RandAugment {strength} (p={self.randaugment_probability:g})")
        if self.color_jitter_probability:
            reach = " ".join(f"{x:g}" for x in self.color_jitter)
            parts.append(f"jitter {reach} (p={self.color_jitter_probability:g})")
        if self.grayscale_probability:
            parts.append(f"grey (p={self.grayscale_probability:g})")
        if self.blur_probability:
            low, high = self.blur_sigma
            parts.append(f"blur {low:g}-{high:g} (p={self.blur_probability:g})")
        if self.affine_probability:
            low, high = self.affine_scale
            parts.append(f"affine {self.affine_degrees:g} deg {self.affine_translate:g} x{low:g}-{high:g}")
            parts[-1] += f" shear {self.affine_shear:g} (p={self.affine_probability:g})"
        if self.cutout:
            parts.append(f"cutout {self.cutout:g}")
        return " + ".join(parts) or "clean"

    @field_validator("crop_scale", "crop_ratio", "blur_sigma", "affine_scale")
    @classmethod
    def _rising(cls, pair: list[float], info: ValidationInfo) -> list[float]:
        if not 0 < pair[0] <= pair[1]:
            raise ValueError("write the range as [low, high] with 0 < low <= high")
        if info.field_name == "crop_scale" and pair[1] > 1:
            raise ValueError("a fraction of the area is at most 1: lower the second number")
        return pair

    @field_validator("color_jitter")
    @classmethod
    def _hue(cls, reach: list[float]) -> list[float]:
        if reach[3] > 0.5:
            raise ValueError("the strength of hue is at most 0.5: lower the fourth number")
        return reach


class SourceView(View):
    """Augmentation of the source view, which the encoder receives."""

    noise_std: float = key(
        0.10, "standard deviation of the Gaussian noise added to the normalised source view; 0: no noise", ge=0
    )


class ProbeView(View):
    """Augmentation of the evaluation. Training does not use it, so all its keys may change when a run is resumed."""

    all_run: ClassVar[bool] = True
    crop_flip_probability: Fraction = key(
        0.65, "probability of crop and flip: a random crop, then a horizontal flip with flip_probability"
    )
    randaugment_probability: Fraction = key(0.0, "probability of applying RandAugment to an image")


class Views(Section):
    """Augmentations: of the encoder's source views, of the decoder's target view, and of the evaluation."""

    num_sources: int = key(
        1,
        "number of source views of an image, drawn independently; z is the mean of their latents; with data.name=posed "
        "it is the largest number of other photographs of the object, and each training step draws a number up to it",
        ge=1,
        le=64,
    )
    same: bool = key(
        False,
        "source and target are the same view: the decoder reconstructs what the encoder sees, apart from "
        "views.source.noise_std; views.source and views.target must augment in the same way",
    )
    canonical: bool = key(
        True,
        "turn the cameras of `posed` about the vertical axis, so that the first source camera has azimuth 0; false: "
        "use the azimuths of the data set, which must then mean the same for all objects",
    )
    ray_octaves: int = key(
        4,
        "number of octaves of sines and cosines that encode the 6 numbers of a pixel's ray, if data.name=posed; "
        "the first layers of encoder and decoder then receive 6 + 12 views.ray_octaves further channels",
        ge=0,
        le=16,
    )
    source: SourceView = SourceView()
    target: View = View()
    probe: ProbeView = ProbeView()


class Encoder(Section):
    """Architecture of the encoder."""

    architecture: Architecture = key(
        "resnet18",
        "architecture of the encoder; torchvision's ResNets by their names, and Wide ResNets of 28 layers for small "
        "images, widened by the last number (a pooled width of 64, 128 or 512)",
    )
    stem: Stem = key(
        "small",
        "first layers of the encoder; `small`: 3x3 convolution, stride 1, for images of about 32 px; `imagenet`: 7x7 "
        "convolution, stride 2, then max-pooling, for larger images; wide_resnet28_* only have `small`",
    )
    width: Channels = key(
        64,
        "channels of the encoder's first group of blocks; each following group has twice as many; 64 is standard; "
        "bottleneck blocks (from resnet50 on) output four times as many; wide_resnet28_* have widths of their own",
    )
    latent_dim: int = key(128, "number of dimensions of the latent z", ge=1)
    probabilistic: bool = key(
        False,
        "the encoder gives the mean and the log-variance of a normal distribution; training draws z from it, and "
        "everything else uses the mean; training.terms.kl should then be above 0",
    )
    time_dependent: bool = key(
        False,
        "the encoder also receives the timestep of the decoder's input, through its noise level, so that z is a "
        "function of the timestep; in training, each image is encoded at its own timestep",
    )
    weights: PathText = key(
        "",
        "file with the weights that the encoder starts from: a checkpoint of this program (its EMA encoder), a state "
        "dict of the same architecture, such as torchvision's, whose last layer may have another width, or the "
        ".safetensors file of embed.py --export; on resume, the file may be missing; empty: random weights",
        run=True,
    )
    frozen: bool = key(
        False, "keep the weights and the BatchNorm statistics of the encoder as they are, and train only the decoder"
    )


class Decoder(Section):
    """Architecture of the denoising decoder."""

    image_size: int | None = key(
        None,
        "height and width in pixels of the images that the decoder denoises; target views are drawn at data.image_size "
        "and averaged down to this size, or drawn at this size if data.stored_size is set; it must divide "
        "data.image_size; null: data.image_size",
        ge=4,
        le=4096,
    )
    model_channels: Channels = key(
        128, "base number of channels of the decoder; decoder.channel_mult multiplies it at each level"
    )
    channel_mult: list[Annotated[int, Field(ge=1)]] = key(
        [1, 2, 2, 2],
        "channels of each decoder level, as multiples of decoder.model_channels: one number per level, from the "
        "highest resolution to the lowest; each level has half the resolution of the level before",
        min_length=1,
    )
    num_res_blocks: int = key(
        2, "residual blocks per decoder level on the way down; on the way up, each level has one more", ge=1
    )
    attn_resolutions: list[int] = key(
        [16],
        "feature-map sizes, in pixels, at which the decoder has self-attention; the middle of the decoder always has "
        "it; []: only the middle",
    )
    num_head_channels: int | None = key(
        None, "channels per head of the decoder's self-attention; null: one head with all channels", ge=1
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = key(
        0.1, "probability of dropout in the decoder's residual blocks; 0: no dropout"
    )
    scale_offset: float = key(
        1.0,
        "constant added to the learned scales of the decoder's AdaGN layers; 1: an untrained layer keeps the "
        "magnitude of its features; 0: as in the reference implementation",
        ge=0,
    )
    weights: PathText = key(
        "",
        "checkpoint of this program whose EMA decoder gives the weights that the decoder starts from; not used on "
        "resume; empty: random weights",
        run=True,
    )
    cross_attention: bool = key(
        False,
        "novel views (data.name=posed): wherever the decoder has self-attention, it also attends to the encoder's last "
        "feature map, as in SODA's experiments on 3-D data; the decoder then receives more of the source than z",
    )
    modulation: Modulation = key(
        "shared",
        "shared: the whole latent modulates every decoder block; sectioned: the latent is divided into sections, and "
        "each section but the last modulates one block on the way down and the matching blocks on the way up; the last "
        "section modulates the middle",
    )

    @property
    def num_sections(self) -> int:
        """Number of sections of the latent; 1 if the modulation is shared."""
        return num_sections(self.modulation, len(self.channel_mult), self.num_res_blocks)


class NoiseSchedule(Section):
    """Noise levels of the timesteps. finetune.py uses them for a time-dependent encoder, and not for others."""

    schedule: Schedule = key("linear", "noise schedule of training and sampling; docs/schedules.md compares them")
    num_timesteps: int = key(1000, "number T of diffusion timesteps", ge=1)
    beta_start: Annotated[float, Field(ge=1e-12, lt=1)] = key(
        1e-4, "beta of the first timestep in the linear schedule; other schedules ignore it"
    )
    beta_end: Annotated[float, Field(gt=0, lt=1)] = key(
        0.02, "beta of the last timestep in the linear schedule; other schedules ignore it"
    )
    sigma_min: Annotated[float, Field(ge=1e-4, le=1e4)] = key(
        0.02,
        "standard deviation of the noise of the geometric schedule at u = 0, for images in [-1, 1]; other schedules "
        "ignore it",
    )
    sigma_max: Annotated[float, Field(ge=1e-4, le=1e4)] = key(
        100.0,
        "standard deviation of the noise of the geometric schedule at u = 1, for images in [-1, 1]; other schedules "
        "ignore it",
    )


class Diffusion(NoiseSchedule):
    """Noise schedule, timesteps and prediction target."""

    prediction: Prediction = key(
        "eps",
        "quantity that the decoder predicts; eps: the noise; x_start: the clean target view; v: "
        "sqrt(alphas_cumprod) eps - sqrt(1 - alphas_cumprod) x_start",
    )


class Rates(Section):
    """Course of the learning rates, and the limit of the gradients."""

    warmup_epochs: float = key(
        20.0,
        "epochs over which all learning rates rise linearly, step by step; may be a fraction; 0: no warm-up",
        ge=0,
        le=1e6,
    )
    schedule: Literal["constant", "cosine"] = key(
        "constant", "learning rate after the warm-up: constant, or a cosine that reaches zero after the last step"
    )
    cooldown_epochs: float = key(
        0.0,
        "last epochs, in which all learning rates fall linearly, step by step, to zero after the last step; may be a "
        "fraction; 0: no cool-down; a value above 0 needs optimizer.schedule=constant",
        ge=0,
        le=1e6,
    )
    max_grad_norm: Positive = key(
        1.0, "largest norm of the gradient over all parameters; a larger gradient is scaled down to it"
    )

    @property
    def fixed_end(self) -> str | None:
        """Setting by which the learning rates depend on the last epoch, as key=value; None if there is none."""
        if self.schedule == "cosine":
            return "optimizer.schedule=cosine"
        return f"optimizer.cooldown_epochs={self.cooldown_epochs:g}" if self.cooldown_epochs else None


class Optimizer(Rates):
    """Settings of AdamW. Learning rates are not scaled by the batch size or by the number of processes."""

    encoder_lr: Positive = key(8e-4, "learning rate of the encoder, reached at the end of the warm-up")
    decoder_lr: Positive = key(4e-4, "learning rate of the decoder, reached at the end of the warm-up")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = key(
        [0.9, 0.95],
        "AdamW's two betas: decay of the running means of the gradients and of their squares",
        min_length=2,
        max_length=2,
    )
    weight_decay: float = key(0.05, "AdamW's weight decay, applied to all parameters; 0: none", ge=0)


class Mask(Section):
    """Probabilities of replacing latents by zeros in training: whole latents and, independently, single sections."""

    latent_probability: Fraction = key(
        0.1,
        "probability of replacing the whole latent of a sample by zeros (the null latent) in training; "
        "classifier-free guidance needs a value above 0",
    )
    section_probability: Fraction = key(
        0.0,
        "probability of replacing a section of a sample's latent by zeros in training, drawn for each section; a value "
        "above 0 needs decoder.modulation=sectioned",
    )


class Timesteps(Section):
    """Sampling of the timesteps in training."""

    sampling: TimestepSampling = key(
        "uniform",
        "distribution of timesteps in training; log_snr: normal in the logarithm of the signal-to-noise ratio; "
        "adaptive: follows the losses, with weights, so that the objective is the same as with uniform",
    )
    log_snr_mean: float = key(
        0.0, "mean of the log-SNR if training.timesteps.sampling=log_snr; 0: signal and noise are equally strong"
    )
    log_snr_std: Positive = key(
        2.0,
        "standard deviation of the log-SNR if training.timesteps.sampling=log_snr; the part of the density outside the "
        "log-SNRs of diffusion.schedule is cut off",
    )


class Terms(Section):
    """Weights of loss terms that are added to the denoising loss. None of them is SODA's."""

    reconstruction: float = key(
        0.0,
        "weight of the mean squared error of the predicted clean target view; 0: no such term; with "
        "diffusion.prediction=eps, this error equals the squared error of eps, divided by the signal-to-noise ratio, "
        "so the last timesteps dominate: use v or x_start",
        ge=0,
    )
    kl: float = key(
        0.0,
        "weight of the KL divergence of z from a standard normal distribution, summed over z and divided by half the "
        "number of values of a target view; needs encoder.probabilistic; Diffusion-Based Representation Learning has "
        "1e-5; 0: no such term",
        ge=0,
    )
    l1: float = key(
        0.0,
        "weight of the L1 norm of z, divided by half the number of values of a target view; 0: no such term",
        ge=0,
    )


class Running(Section):
    """Length of the training, batch size, arithmetic, EMA, reports and checkpoints."""

    epochs: int = key(
        800,
        "number of epochs, each of floor(training images / training.batch_size) steps; if optimizer.schedule is "
        "constant, may be raised on resume, or, with optimizer.cooldown_epochs, changed before the cool-down",
        ge=1,
    )
    batch_size: int = key(512, "images per training step, over all processes", ge=4, multiple_of=4)
    use_amp: bool = key(
        False, "mixed precision: bf16 if the hardware computes it, else fp16 on CUDA and float32 on other devices"
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = key(
        0.9999, "largest decay of the exponential moving average (EMA) of the weights; training.ema_power sets its rise"
    )
    ema_power: Positive = key(
        2 / 3,
        "exponent of the rise of the EMA's decay: at step n (from 1), the decay is 1 - n^-ema_power, but at most "
        "training.ema_decay",
    )
    checkpoint_every: str = key(
        "10 minutes",
        "interval between checkpoints: `N steps`, `N epochs` or `N minutes`; a checkpoint is also saved before each "
        "evaluation and after the last step",
        run=True,
    )
    keep_every: int | None = key(
        None,
        "epochs between checkpoints that are kept permanently, as epoch_<number>.pt; null: only the two newest "
        "checkpoints are kept",
        run=True,
        ge=1,
    )
    log_every: int = key(50, "training steps between reports of loss, learning rates and speed", run=True, ge=1)

    @field_validator("checkpoint_every", mode="before")
    @classmethod
    def _interval(cls, text: Any) -> Any:
        if not isinstance(text, str) or not re.fullmatch(r"[1-9]\d* (steps|epochs|minutes)", text):
            raise ValueError(f"write `N steps`, `N epochs` or `N minutes`, not {text!r}")
        return text


class Training(Running):
    """Micro-batches, loss and compilation, and the keys of `Running`."""

    micro_batch_size: int | None = key(
        None,
        "images per forward pass of each process; a smaller value saves memory, and each step adds up the gradients of "
        "several passes; BatchNorm then normalises over one pass of all processes together; null: one pass per step",
        run=True,
        ge=4,
        multiple_of=4,
    )
    compile: bool | None = key(
        None, "true: compile the model with torch.compile for training; false: do not; null: only on CUDA", run=True
    )
    mask: Mask = Mask()
    timesteps: Timesteps = Timesteps()
    terms: Terms = Terms()
    min_snr_gamma: Positive | None = key(
        None,
        "weight the denoising loss by min-SNR: the squared error of x_start is multiplied by the signal-to-noise "
        "ratio, but at most by this number (5 in the paper of Hang et al. 2023); null: no such weight",
    )


class KNN(Section):
    """Settings of k-NN."""

    k: int = key(20, "number of nearest training images that vote for the class of a test image", run=True, ge=1)
    weights: Literal["uniform", "temperature"] = key(
        "uniform",
        "weight of each neighbour's vote; uniform: 1; temperature: exp(cosine similarity / evaluation.knn.temperature)",
        run=True,
    )
    temperature: Positive = key(
        0.1, "temperature of the votes if evaluation.knn.weights=temperature; otherwise ignored", run=True
    )
    bank: Literal["clean", "augmented"] = key(
        "clean",
        "training images that k-NN searches; clean: not augmented; augmented: augmented once by `views.probe`",
        run=True,
    )


class Probe(Section):
    """Settings of the linear probe."""

    transform: Literal["clean", "augmented"] = key(
        "augmented",
        "training images of the linear probe; clean: not augmented; augmented: augmented by `views.probe`, with new "
        "random draws in each epoch",
        run=True,
    )
    solver: Literal["adam", "lbfgs"] = key(
        "adam",
        "optimiser of the linear probe; adam: the reference's, for a fixed number of epochs; lbfgs: L-BFGS until "
        "convergence, on one epoch of standardised features, with an L2 penalty chosen on a held-out tenth of them; "
        "lbfgs ignores epochs, lr and batch_size",
        run=True,
    )
    epochs: int = key(
        15, "training epochs of the linear probe; a cosine lowers its learning rate to zero by the end", run=True, ge=1
    )
    lr: Positive = key(1e-3, "initial learning rate of the linear probe if Adam trains it", run=True)
    batch_size: int = key(128, "images per training step of the linear probe", run=True, ge=2)


class Evaluating(Section):
    """Interval and batch size of evaluations."""

    every: int = key(
        100, "epochs between evaluations of the EMA model; it is also evaluated after the last epoch", run=True, ge=1
    )
    batch_size: int = key(512, "images per forward pass of each process in the evaluation", run=True, ge=1)


class Evaluation(Evaluating):
    """Evaluation of the EMA model by k-NN, linear probe and, if wanted, an MLP."""

    features: str = key(
        "z",
        "features to evaluate; z: the latent; pooled: the input of the encoder's last layer; "
        "decoder.<block>@<timestep>, such as decoder.up.5@20: the output of a decoder block without a latent, for "
        "images with the noise of that timestep, averaged over the pixels",
        run=True,
    )
    normalize: bool = key(True, "scale each feature vector to length 1 before k-NN and linear probe", run=True)
    timesteps: list[Annotated[int, Field(ge=0)]] | None = key(
        None,
        "timesteps at which z and the pooled features of a time-dependent encoder are judged, as z@<timestep>; null: "
        "five, evenly spaced",
        run=True,
        min_length=1,
    )
    mlp: bool = key(
        False,
        "also train an MLP on the features, with one hidden layer of 512 units and dropout 0.25; transform, epochs, lr "
        "and batch_size are those of evaluation.probe",
        run=True,
    )
    num_novel_views: int = key(
        500,
        "number of test images, drawn by the seed, that test.py generates as novel views if data.name=posed; each "
        "costs 50 passes of the decoder, twice as many if views.num_sources is above 1, and twice as many with "
        "guidance; 0: none",
        run=True,
        ge=0,
    )
    knn: KNN = KNN()
    probe: Probe = Probe()

    @field_validator("features")
    @classmethod
    def _features(cls, name: str) -> str:
        if not re.fullmatch(r"z|pooled|decoder\.(down|middle|up)\.\d+@\d+", name):
            raise ValueError(f"write z, pooled or decoder.<block>@<timestep>, such as decoder.up.5@20, not {name}")
        return name


class Sampling(Section):
    """DDIM sampling and guidance."""

    num_images: int = key(
        16,
        "number of images in the grid of samples of each evaluation; they are test images, or training images if there "
        "is no test split; 0: no grid",
        run=True,
        ge=0,
    )
    num_sampling_steps: int = key(
        100, "number of DDIM steps per sample; at most diffusion.num_timesteps", run=True, ge=1
    )
    guidance_scale: list[Annotated[float, Field(ge=0)]] = key(
        [1.3],
        "scale of classifier-free guidance: one number, or a list with one for each section of the latent; 1: no "
        "guidance; 0: the latent (or section) is ignored",
        run=True,
        min_length=1,
    )
    sections: list[int] | None = key(
        None,
        "indices, from 0, of the sections of the latent that samples are conditioned on; null: all; a list needs "
        "decoder.modulation=sectioned, and works best if training.mask.section_probability was above 0 in training",
        run=True,
    )
    eta: float = key(
        0.0, "noise that each DDIM step adds; 0: none (deterministic); 1: as much as DDPM", run=True, ge=0, le=1
    )

    @field_validator("guidance_scale", mode="before")
    @classmethod
    def _listed(cls, scale: Any) -> Any:
        return scale if isinstance(scale, list) else [scale]

    def __str__(self) -> str:
        """Returns guidance scales, eta and sections in one line, for protocols and captions."""
        text = f"guidance {' '.join(f'{scale:g}' for scale in self.guidance_scale)}, eta {self.eta:g}"
        return text if self.sections is None else f"{text}, sections {self.sections}"


class Distributed(Section):
    """Communication between processes, if there are several."""

    all_run: ClassVar[bool] = True
    backend: Literal["auto", "nccl", "gloo"] = key(
        "auto", "library that sends tensors between processes; auto: nccl if each process has its own GPU, else gloo"
    )
    timeout_minutes: float = key(
        30.0, "minutes that a process waits for the other processes before it ends with an error", ge=0.2, le=1e5
    )


class RunConfig(Section):
    """Base class of a whole config, of any program that trains.

    Attributes:
        program: name of the program.
        marker: key that each config file of this program must have, so that files of other programs are refused; None:
            there is no such key.
    """

    program: ClassVar[str]
    marker: ClassVar[str | None] = None

    seed: int = key(0, "seed of all random numbers", ge=0)
    output_dir: PathText = key(
        "", "run folder, for checkpoints, logs and results; empty: runs/<name of the config file>", run=True
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = key(
        "auto", "device to compute on; auto: cuda if available, else mps, else cpu", run=True
    )
    data: Data = Data()
    encoder: Encoder = Encoder()
    diffusion: NoiseSchedule = NoiseSchedule()
    optimizer: Rates = Rates()
    training: Running = Running()
    evaluation: Evaluating = Evaluating()
    distributed: Distributed = Distributed()

    @property
    def training_images(self) -> str:
        """Keys that name the training images, with their values, for messages."""
        return f"data.root ({self.data.root})"

    @property
    def run_name(self) -> str:
        """Default folder of the run inside that of the config file; empty: the folder of the config file."""
        return ""

    @property
    def encoder_size(self) -> int:
        """Height and width in pixels of the images that the encoder receives."""
        return self.data.image_size

    def to_yaml(self) -> str:
        """Returns the config with all keys as YAML; `parse` reads back an equal config."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, default_flow_style=None, width=100)


class Config(RunConfig):
    """The whole config of train.py, and of the programs that use what it has trained."""

    program = "train.py"

    views: Views = Views()
    decoder: Decoder = Decoder()
    initialization: Initialization = key(
        "default",
        "initial weights; default: as torchvision and torch draw them, with zeros in the last layer of the decoder and "
        "of each of its residual branches; torch: the same without these zeros; paper: Xavier in the encoder and "
        "truncated normal in the decoder, whose residual sums are divided by sqrt 2",
    )
    diffusion: Diffusion = Diffusion()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        check_consistency(self)
        return self

    @property
    def decoder_size(self) -> int:
        """Height and width in pixels of the images that the decoder denoises."""
        return self.decoder.image_size or self.data.image_size

    @property
    def ray_octaves(self) -> int | None:
        """Octaves of the encoding of rays, in encoder and decoder; None: images have no cameras."""
        return self.views.ray_octaves if self.data.has_cameras else None

    @property
    def judged_timesteps(self) -> list[int | None]:
        """Timesteps at which the encoder's features are judged; [None]: they do not depend on the timestep."""
        if not self.encoder.time_dependent:
            return [None]
        count = self.diffusion.num_timesteps
        return sorted({*(self.evaluation.timesteps or (count * odd // 10 for odd in (1, 3, 5, 7, 9)))})
