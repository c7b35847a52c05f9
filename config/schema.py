"""The experiment's definition: every key, its type, default, range and meaning, in one place.

Keys are of two kinds. An *experiment* key defines what is computed and must agree when a run is resumed; a *run*
key (paths, intervals, device, ...) may change from one start to the next.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from config.consistency import check_consistency
from model.names import Architecture, Initialization, Modulation, Schedule, Stem
from model.sizes import num_sections

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Channels = Annotated[int, Field(ge=4, multiple_of=4)]


# A path may start with ~, and never holds a null character.
def _path(text: str) -> str:
    if any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        raise ValueError("a name in a path has at most 255 bytes")
    return str(Path(text).expanduser()) if text.startswith("~") else text


PathText = Annotated[str, Field(pattern=r"^[^\x00]*$"), AfterValidator(_path)]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]


def key(default: Any, meaning: str, *, run: bool = False, **bounds: Any) -> Any:
    """One documented key; `run=True` lets it change when a run is resumed."""
    return Field(default, description=meaning, json_schema_extra={"run": run}, **bounds)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    all_run: ClassVar[bool] = False  # whether all its keys are run keys, whatever they say themselves

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return {} if value is None else value  # a section's name with nothing under it


class Data(Section):
    name: Literal["digits", "fashion_mnist", "cifar10", "cifar100", "tiny", "folder"] = key("cifar10", "data set")
    root: PathText = key("data", "folder that holds the data set, or receives its download", run=True)
    cache_dir: PathText = key("data/cache", "folder for decoded images of `tiny` and `folder`", run=True)
    image_size: int = key(32, "height and width in pixels that images are decoded to and modelled at", ge=4, le=4096)
    stream: bool | None = key(
        None,
        "decode the files of `tiny` and `folder` while they are used; null: if they fill half of the memory",
        run=True,
    )
    num_workers: int | None = key(
        None,
        "threads that decode images; null: one a core, of which processes have a share each while images stream",
        run=True,
        ge=1,
        le=1024,
    )


class View(Section):
    """Augmentation of one view of an image: crop and flip, RandAugment, colours, affine move, in this order."""

    crop_flip_probability: Probability = key(0.95, "probability of applying crop and flip")
    crop_scale: Pair = key([0.08, 1.0], "range of the crop's share of the area")
    crop_ratio: Pair = key([3 / 4, 4 / 3], "range of the crop's aspect ratio")
    flip_probability: Probability = key(0.5, "probability of a horizontal flip, if crop and flip are applied")
    randaugment_probability: Probability = key(0.65, "probability of applying RandAugment")
    randaugment_num_ops: int = key(2, "operations that RandAugment applies", ge=1)
    randaugment_magnitude: int = key(9, "strength of the operations, of 31 bins", ge=0, le=30)
    color_jitter_probability: Probability = key(0.0, "probability of colour jitter")
    color_jitter: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=4, max_length=4)] = key(
        [0.4, 0.4, 0.4, 0.1], "reach of brightness, contrast, saturation (about 1) and hue (about 0, at most 0.5)"
    )
    grayscale_probability: Probability = key(0.0, "probability of greyscale")
    affine_probability: Probability = key(0.0, "probability of applying a random affine move")
    affine_degrees: float = key(0.0, "rotation up to this many degrees either way", ge=0, le=180)
    affine_translate: Probability = key(0.0, "shift up to this share of the image size, each axis")
    affine_scale: Pair = key([1.0, 1.0], "range of the zoom factor")
    affine_shear: float = key(0.0, "shear up to this many degrees either way", ge=0, lt=90)

    def __str__(self) -> str:
        """The augmentation in a few words, for tables; views that differ (to six digits) have different words."""
        parts = []
        if self.crop_flip_probability:
            (low, high), (narrow, wide) = self.crop_scale, self.crop_ratio
            parts.append(f"crop {low:g}-{high:g} ratio {narrow:g}-{wide:g} flip {self.flip_probability:g}")
            parts[-1] += f" (p={self.crop_flip_probability:g})"
        if self.randaugment_probability:
            strength = f"{self.randaugment_num_ops}x{self.randaugment_magnitude}"
            parts.append(f"RandAugment {strength} (p={self.randaugment_probability:g})")
        if self.color_jitter_probability:
            reach = " ".join(f"{x:g}" for x in self.color_jitter)
            parts.append(f"jitter {reach} (p={self.color_jitter_probability:g})")
        if self.grayscale_probability:
            parts.append(f"grey (p={self.grayscale_probability:g})")
        if self.affine_probability:
            low, high = self.affine_scale
            parts.append(f"affine {self.affine_degrees:g} deg {self.affine_translate:g} x{low:g}-{high:g}")
            parts[-1] += f" shear {self.affine_shear:g} (p={self.affine_probability:g})"
        return " + ".join(parts) or "clean"

    @field_validator("crop_scale", "crop_ratio", "affine_scale")
    @classmethod
    def _rising(cls, pair: list[float], info: ValidationInfo) -> list[float]:
        if not 0 < pair[0] <= pair[1]:
            raise ValueError("a range is [low, high] with 0 < low <= high")
        if info.field_name == "crop_scale" and pair[1] > 1:
            raise ValueError("a share of the area is at most 1")
        return pair

    @field_validator("color_jitter")
    @classmethod
    def _hue(cls, reach: list[float]) -> list[float]:
        if reach[3] > 0.5:
            raise ValueError("the reach of hue is at most 0.5")
        return reach


class SourceView(View):
    noise_std: float = key(0.10, "deviation of the Gaussian noise added to the normalised view", ge=0)


class ProbeView(View):
    """View of the evaluation; all its keys may change when a run is resumed, since training does not use them."""

    all_run: ClassVar[bool] = True
    crop_flip_probability: Probability = key(0.65, "probability of applying crop and flip")
    randaugment_probability: Probability = key(0.0, "probability of applying RandAugment")


class Views(Section):
    source: SourceView = SourceView()
    target: View = View()
    probe: ProbeView = ProbeView()


class Encoder(Section):
    architecture: Architecture = key("resnet18", "depth and kind of blocks")
    stem: Stem = key("small", "`small`: 3x3, stride 1, no pooling; `imagenet`: 7x7 and pooling")
    width: Channels = key(64, "channels of the first group of blocks; each group doubles them")
    latent_dim: int = key(128, "width of the latent z", ge=1)


class Decoder(Section):
    model_channels: Channels = key(128, "channels of the first level")
    channel_mult: list[Annotated[int, Field(ge=1)]] = key([1, 2, 2, 2], "channel multiples, a level each", min_length=1)
    num_res_blocks: int = key(2, "residual blocks a level going down; one more going up", ge=1)
    attn_resolutions: list[int] = key([16], "feature-map sizes, in pixels, with self-attention")
    num_head_channels: int | None = key(None, "channels of an attention head; null: one head", ge=1)
    dropout: Annotated[float, Field(ge=0, lt=1)] = key(0.1, "dropout in the residual blocks")
    scale_offset: float = key(1.0, "AdaGN's scales are this + linear(...); the reference implementation has 0", ge=0)
    modulation: Modulation = key(
        "shared", "the latent modulates every block as a whole, or a section of it each pair of blocks"
    )

    @property
    def num_sections(self) -> int:
        """Sections of the latent."""
        return num_sections(self.modulation, len(self.channel_mult), self.num_res_blocks)


class Diffusion(Section):
    schedule: Schedule = key("linear", "noise schedule")
    num_timesteps: int = key(1000, "timesteps T", ge=1)
    beta_start: Annotated[float, Field(ge=1e-12, lt=1)] = key(1e-4, "first beta of the linear schedule")
    beta_end: Annotated[float, Field(gt=0, lt=1)] = key(0.02, "last beta of the linear schedule")


class Optimizer(Section):
    """AdamW. The learning rates belong to the global batch: nothing multiplies them."""

    encoder_lr: Positive = key(8e-4, "learning rate of the encoder")
    decoder_lr: Positive = key(4e-4, "learning rate of the decoder")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = key([0.9, 0.95], "AdamW's betas", min_length=2, max_length=2)
    weight_decay: float = key(0.05, "AdamW's weight decay", ge=0)
    warmup_epochs: float = key(20.0, "linear warm-up, a step at a time, over this many epochs", ge=0, le=1e6)
    schedule: Literal["constant", "cosine"] = key("constant", "after the warm-up; cosine: to zero, after the last step")
    max_grad_norm: Positive = key(1.0, "gradients are clipped to this norm")


class Mask(Section):
    """Probabilities of dropping a sample's latent in training: as a whole, and section by section on top of that."""

    latent_probability: Probability = key(0.1, "probability of replacing a sample's whole latent by the null latent")
    section_probability: Probability = key(
        0.0, "probability of replacing each section of it, independently; needs decoder.modulation sectioned"
    )


class Training(Section):
    epochs: int = key(800, "epochs of floor(images / batch_size) steps; may be raised on resume", ge=1)
    batch_size: int = key(512, "images a step, over all processes", ge=4, multiple_of=4)
    micro_batch_size: int | None = key(
        None,
        "images a forward pass of each process, to save memory; BatchNorm sees no more of each; null: all at once",
        run=True,
        ge=4,
        multiple_of=4,
    )
    use_amp: bool = key(False, "mixed precision: bf16 where the hardware computes it, else fp16 on CUDA")
    compile: bool | None = key(None, "torch.compile the model for training; null: on CUDA", run=True)
    mask: Mask = Mask()
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = key(0.9999, "cap of the EMA's decay, which warms up")
    ema_power: Positive = key(2 / 3, "the EMA's decay at step n is 1 - (1 + n)^-ema_power, up to its cap")
    log_every: int = key(50, "steps between reports", run=True, ge=1)
    checkpoint_every: str = key("10 minutes", "`N steps`, `N epochs` or `N minutes`", run=True)
    keep_every: int | None = key(None, "epochs between checkpoints kept for good; null: none", run=True, ge=1)

    @field_validator("checkpoint_every", mode="before")
    @classmethod
    def _interval(cls, text: Any) -> Any:
        if not isinstance(text, str) or not re.fullmatch(r"[1-9]\d* (steps|epochs|minutes)", text):
            raise ValueError(f"write `N steps`, `N epochs` or `N minutes`, not {text!r}")
        return text


class KNN(Section):
    k: int = key(20, "neighbours", run=True, ge=1)
    weights: Literal["uniform", "temperature"] = key(
        "uniform", "votes: all alike, or exp(cosine / temperature)", run=True
    )
    temperature: Positive = key(0.1, "temperature of the `temperature` weights", run=True)
    bank: Literal["clean", "augmented"] = key("clean", "training images as they are, or by `views.probe`", run=True)


class Probe(Section):
    transform: Literal["clean", "augmented"] = key(
        "augmented", "training images as they are, or by `views.probe` anew each epoch", run=True
    )
    epochs: int = key(15, "epochs; the learning rate falls to zero by a cosine", run=True, ge=1)
    lr: Positive = key(1e-3, "Adam's learning rate", run=True)
    batch_size: int = key(128, "images a step", run=True, ge=2)


class Evaluation(Section):
    every: int = key(100, "epochs between evaluations of the EMA encoder; always at the end", run=True, ge=1)
    batch_size: int = key(512, "images a forward pass", run=True, ge=1)
    features: str = key(
        "z",
        "z; pooled, before the encoder's last layer; decoder.<block>@<timestep>, of the decoder without a latent",
        run=True,
    )
    normalize: bool = key(True, "scale features to length 1", run=True)
    knn: KNN = KNN()
    probe: Probe = Probe()

    @field_validator("features")
    @classmethod
    def _features(cls, name: str) -> str:
        if not re.fullmatch(r"z|pooled|decoder\.(down|middle|up)\.\d+@\d+", name):
            raise ValueError(f"write z, pooled or decoder.<block>@<timestep>, as decoder.up.5@20, not {name}")
        return name


class Sampling(Section):
    num_images: int = key(16, "test images in the grid of samples; 0: no grid", run=True, ge=0)
    num_sampling_steps: int = key(100, "DDIM steps", run=True, ge=1)
    guidance_scale: list[Annotated[float, Field(ge=0)]] = key(
        [1.3], "classifier-free guidance, one scale or one for each section; 1: none", run=True, min_length=1
    )
    sections: list[int] | None = key(
        None, "of the latent, that samples are conditioned on; null: all; for runs that mask sections", run=True
    )
    eta: float = key(0.0, "0: deterministic DDIM; 1: as much noise as DDPM", run=True, ge=0, le=1)

    @field_validator("guidance_scale", mode="before")
    @classmethod
    def _listed(cls, scale: Any) -> Any:
        return scale if isinstance(scale, list) else [scale]


class Distributed(Section):
    """Communication between processes, if a launcher starts several."""

    all_run: ClassVar[bool] = True
    backend: Literal["auto", "nccl", "gloo"] = key("auto", "auto: nccl where each process has a GPU, else gloo")
    timeout_minutes: float = key(30.0, "a process that waits longer for the others ends", ge=0.2, le=1e5)


class Config(Section):
    seed: int = key(0, "seed of all randomness", ge=0)
    output_dir: PathText = key("", "folder of the run; empty: runs/<name of the config file>", run=True)
    device: Literal["auto", "cpu", "cuda", "mps"] = key("auto", "auto: cuda, else mps, else cpu", run=True)
    data: Data = Data()
    views: Views = Views()
    encoder: Encoder = Encoder()
    decoder: Decoder = Decoder()
    initialization: Initialization = key(
        "default",
        "default: torchvision's and torch's, branches start at zero; paper: Xavier, truncated normal, / sqrt 2",
    )
    diffusion: Diffusion = Diffusion()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    sampling: Sampling = Sampling()
    distributed: Distributed = Distributed()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        check_consistency(self)
        return self

    @property
    def encoder_size(self) -> int:
        """Height and width in pixels of the encoder's images."""
        return self.data.image_size

    @property
    def decoder_size(self) -> int:
        """Height and width in pixels of the decoder's images."""
        return self.data.image_size

    def to_yaml(self) -> str:
        """The resolved config; reading it back gives an equal one."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, default_flow_style=None, width=100)
