"""From a config to objects: what stays as it is (`Experiment`), and the first state of what training changes."""

from dataclasses import dataclass

import torch

from datasets import DatasetError, DatasetInfo, Images, Loader, StoredImages, Views, build_dataset
from model import SODA, GaussianDiffusion, build_soda, forward_flops
from training.ema import EMA
from training.state import Tally, TrainState
from utils.agreement import first_on_each_node
from utils.config import Config, ConfigError
from utils.device import FUSED, choose_amp_dtype, choose_device
from utils.distributed import exchange, local_world_size, same_everywhere, start, world_size
from utils.randomness import CHUNK, derive_seed, generator


@dataclass(frozen=True)
class Experiment:
    """Everything that training and evaluation only read; `test` is None for unlabelled images."""

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
    def total_steps(self) -> int:
        return self.config.training.epochs * self.loader.steps_per_epoch


def open_experiment(config: Config) -> Experiment:
    """Load the data and lay everything out on the device; raises ConfigError and DatasetError."""
    device, amp_dtype = open_device(config)
    data = {**config.data.model_dump(), "processes": local_world_size()}
    train, test, info = first_on_each_node(lambda: build_dataset(**data))
    data_digest = train.digest()
    if not same_everywhere((data_digest, test and test.digest())):
        raise DatasetError(f"the machines hold different images in {config.data.root}: give them all the same")
    train, test = _near(train, device), test and _near(test, device)
    batch_size, k = config.training.batch_size, config.evaluation.knn.k
    if len(train) < batch_size:
        raise DatasetError(f"{len(train)} training images are fewer than a batch: set training.batch_size lower")
    if test is not None and len(train) < k:
        raise DatasetError(f"evaluation.knn.k {k} is more than the {len(train)} training images: set it lower")
    return Experiment(
        config=config,
        device=device,
        amp_dtype=amp_dtype,
        train=train,
        test=test,
        data_digest=data_digest,
        info=info,
        views=Views(config.views, info.image_size, info.mean, info.std, device),
        loader=Loader(len(train), batch_size, lambda epoch: generator(config.seed, "order", epoch)),
        diffusion=GaussianDiffusion(**config.diffusion.model_dump(), device=device),
    )


def open_device(config: Config) -> tuple[torch.device, torch.dtype | None]:
    """This process's device, its autocast, and the group that tensors travel through; raises ConfigError."""
    device = choose_device(config.device)
    amp_dtype = choose_amp_dtype(config.training.use_amp, device)
    arithmetic = [f"{kind} in {dtype or 'float32'}" for kind, dtype in exchange((device.type, amp_dtype))]
    if len(set(arithmetic)) > 1:
        raise ConfigError(f"the processes compute differently ({', '.join(arithmetic)}): set device, training.use_amp")
    start(config.distributed.backend, device)
    return device, amp_dtype


def _near(images: Images, device: torch.device) -> Images:
    """The images in a GPU's memory, if they take no more than a quarter of what is free there; else on the host."""
    if device.type != "cuda" or not isinstance(images, StoredImages):
        return images
    return images if images.pixels.numel() > torch.cuda.mem_get_info(device)[0] / 4 else images.to(device)


def check_shares(config: Config) -> None:
    """Raise ConfigError where the processes do not divide the batch into equal shares of whole chunks."""
    batch_size, unit = config.training.batch_size, CHUNK * world_size()
    if batch_size % unit:
        below = batch_size // unit * unit
        near = f"{below} or {below + unit}" if below else str(unit)
        raise ConfigError(
            f"training.batch_size {batch_size} does not divide into shares of a multiple of {CHUNK} images for each of "
            f"{world_size()} processes: take {near}"
        )
    share = batch_size // world_size()
    micro_batch_size = min(config.training.micro_batch_size or share, share)
    if share % micro_batch_size:
        raise ConfigError(
            f"training.micro_batch_size {micro_batch_size} does not divide the {share} images of each process"
        )


def batch_norm_batch_size(experiment: Experiment) -> int:
    """How many images BatchNorm normalises over: what all processes see in one forward pass."""
    config = experiment.config.training
    return min((config.micro_batch_size or config.batch_size) * world_size(), config.batch_size)


def less_memory(experiment: Experiment) -> str:
    """Which micro-batch takes at most half of the memory that a step takes now."""
    mine = experiment.config.training.batch_size // world_size()
    now = min(experiment.config.training.micro_batch_size or mine, mine)
    smaller = [size for size in range(CHUNK, now // 2 + 1, CHUNK) if mine % size == 0]
    if not smaller:
        return f"a micro-batch of {now} images is the least there is: take a smaller model"
    return f"training.micro_batch_size={smaller[-1]} halves what a step takes (it is {now}), and goes on with this run"


def _build(config: Config) -> SODA:
    encoder, decoder = config.encoder.model_dump(), config.decoder.model_dump()
    return build_soda(config.data.image_size, encoder, decoder, config.initialization)


def build_on_meta(config: Config) -> SODA:
    """The model without its numbers: names and shapes, which cost nothing."""
    with torch.device("meta"):
        return _build(config)


def describe_model(config: Config) -> str:
    """Parameters of encoder and decoder, their work on one image, and which section of z modulates which layer."""
    soda = build_on_meta(config)
    flops = forward_flops(soda, config.data.image_size)
    lines = []
    for name, module, work in zip(("encoder", "decoder"), (soda.encoder, soda.decoder), flops, strict=True):
        parameters = sum(p.numel() for p in module.parameters())
        lines.append(f"{name}: {parameters:,} parameters, {work / 1e9:.3f} GFLOP forward an image")
    lines.append(f"training: about {3 * sum(flops) / 1e9:.2f} GFLOP an image, forward and backward")
    if config.decoder.modulation == "sectioned":
        row = "{:<10}{:>5}{:>10}{:>9}  {}".format
        lines += ["", row("layer", "px", "channels", "section", "dimensions of z (width)")]
        for layer in soda.decoder.layers():
            start, stop = layer.dims.start, layer.dims.stop
            dims = f"{start} to {stop - 1} ({stop - start})"
            lines.append(row(layer.name, layer.resolution, layer.channels, layer.section, dims))
    return "\n".join(lines)


def initial_soda(config: Config, device: torch.device) -> SODA:
    """The model at its initial weights, which config and seed alone decide."""
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    return near(_build(config), device)


def near(soda: SODA, device: torch.device) -> SODA:
    """The model on `device`, laid out as is fastest there: channels last on CUDA, where on CPUs that is slower."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return soda.to(device, memory_format=layout)  # type: ignore[call-overload]


def initial_state(experiment: Experiment) -> TrainState:
    """Model, EMA, optimiser and scaler before the first step."""
    config, device = experiment.config.optimizer, experiment.device
    soda = initial_soda(experiment.config, device)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(soda.encoder.parameters()), "lr": config.encoder_lr},
            {"params": list(soda.decoder.parameters()), "lr": config.decoder_lr},
        ],
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
        fused=device.type in FUSED,
    )
    return TrainState(
        soda=soda,
        ema=EMA(soda, experiment.config.training.ema_decay, experiment.config.training.ema_power),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=experiment.amp_dtype == torch.float16),
        tally=Tally(device),
    )
