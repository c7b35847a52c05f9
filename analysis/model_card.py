"""The weights of an encoder as a .safetensors file, and the model card that describes them, README.md."""

import json
from pathlib import Path
from typing import Any

from config.errors import ConfigError
from config.keys import portable
from experiment.models import NOT_LAYERS
from experiment.trained import Trained
from utils.files import replacing
from utils.run_folder.results import is_of_experiment, read_results

CARD = "README.md"
MARK = "library_name: soda"  # a line of every card, by which a card of an earlier export is recognised


def check_card(folder: Path) -> None:
    """Raises ConfigError if the folder holds a README.md that is not a model card of this program."""
    path = folder / CARD
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace").splitlines():
        raise ConfigError(f"{path} is not a model card of this program: export to another folder")


def save_weights(path: Path, trained: Trained) -> None:
    """Writes the weights of the EMA encoder in float32, with what is needed to use them as metadata (texts)."""
    from safetensors.torch import save_file

    weights = {name: each.contiguous() for name, each in trained.soda().encoder.state_dict().items()}
    mean, std = trained.statistics()
    notes = {"encoder": encoder_arguments(trained), "image_size": trained.config.encoder_size, "mean": mean, "std": std}
    notes["grey_bits"] = trained.contents.get("grey_bits")
    texts = {name: json.dumps(value) for name, value in notes.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save_file(weights, partial, {"format": "pt", "checkpoint": trained.digest, **texts})


def encoder_arguments(trained: Trained) -> dict[str, Any]:
    """Returns the keys of the config's `encoder` section that describe its layers."""
    return trained.config.encoder.model_dump(exclude=NOT_LAYERS)


def model_card(trained: Trained, weights: Path, programs: list[Path], timestep: int | None) -> str:
    """Returns the text of the model card, in Markdown with the header that the Hugging Face hub reads.

    Args:
        weights: file that `save_weights` wrote, in the folder of the card.
        programs: exported programs (.pt2, .onnx) in the same folder.
        timestep: timestep of their z, for a time-dependent encoder.
    """
    config, size = trained.config, trained.config.encoder_size
    mean, std = ([round(value, 6) for value in values] for values in trained.statistics())
    arguments = encoder_arguments(trained)
    is_time_dependent = arguments.pop("time_dependent")
    given = {name: json.dumps(value) if isinstance(value, str) else value for name, value in arguments.items()}
    call = ", ".join(f"{name}={value}" for name, value in given.items())
    count, at = config.diffusion.num_timesteps, ""
    if is_time_dependent:
        shown = count // 2 if timestep is None else timestep
        call, at = f"{call}, log_sigmas=torch.zeros({count})", f", timesteps=torch.tensor([{shown}])"
    parts = [
        f"---\n{MARK}\ntags: [image-feature-extraction, diffusion, representation-learning]\n---",
        f"# Image encoder, trained on {config.data.name}\n\n"
        "An image encoder that SODA (Hudson et al., CVPR 2024, arXiv 2311.17901) trained together with a denoising "
        "decoder: the decoder reconstructs a view of an image from noise, given only the latent z of the encoder. This "
        f"is the average of the weights (EMA) at step {trained.step}.",
        _table(
            {
                "architecture": config.encoder.architecture,
                "input": f"RGB images of {size} x {size} px, values from 0 to 1, normalised by mean and std",
                "mean": mean,
                "std": std,
                "output": f"z with {config.encoder.latent_dim} dimensions"
                + (", the mean of a normal distribution" if config.encoder.probabilistic else "")
                + (f", at a timestep from 0 (least noise) to {count - 1}" if is_time_dependent else ""),
                "SHA-256 of the checkpoint": f"`{trained.digest}`",
            }
        ),
        f"With the code of SODA, `{weights.name}` is loaded as follows:",
        "```python\nimport torch\nfrom safetensors.torch import load_file\n\nfrom model.build import ENCODERS\n\n"
        f"encoder = ENCODERS[{given['architecture']}]({call})\n"
        f'encoder.load_state_dict(load_file("{weights.name}"))\n'
        f"images = torch.rand(2, 3, {size}, {size})  # from 0 to 1\n"
        f"mean, std = torch.tensor({mean}), torch.tensor({std})\n"
        f"z = encoder.eval()((images - mean[:, None, None]) / std[:, None, None]{at})\n```",
        f"A new run starts from these weights with `encoder.weights={weights.name}`.",
    ]
    if programs:
        of_timestep = "" if timestep is None else f" (z is that of timestep {timestep})"
        names = " and ".join(f"`{program.name}`" for program in programs)
        parts.append(
            f"{names} need no code of SODA{of_timestep}. They take uint8 pixels (N, 3, {size}, {size}) from 0 to 255, "
            "normalise them, and return z and the pooled features before the last layer."
        )
    results = read_results(trained.folder)
    if is_of_experiment(results, trained.trained_with, trained.step) and results["table"]:
        accuracies = {
            protocol: f"{cells['trained']['top1']:.1f} / {cells['trained']['top3']:.1f}"
            for protocol, cells in results["table"].items()
        }
        parts.append("Top-1 / top-3 accuracy on the test images of the run, in per cent:")
        parts.append(_table(accuracies))
    parts.append(f"Config of the run:\n\n```yaml\n{portable(trained.trained_with).to_yaml()}```")
    return "\n\n".join(parts) + "\n"


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
