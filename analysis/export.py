"""Export of a trained model: programs, weights with a model card, or a small checkpoint."""

from pathlib import Path

from analysis.image_encoder import trained_encoder
from analysis.model_card import CARD, check_card, model_card, save_weights
from analysis.programs import FORMATS, export_encoder
from config.errors import ConfigError
from experiment.trained import Trained, check_no_cameras, check_timestep, reduced_checkpoint
from utils.distributed.processes import rank
from utils.files import check_writable, write_text
from utils.run_folder.checkpoint import read_sums
from utils.run_folder.checkpoint_writer import save_checkpoint


def export(trained: Trained, files: list[Path], timestep: int | None) -> None:
    """Writes the files of `--export` on rank 0, and a model card beside weights. Prints their paths.

    Raises ConfigError if a file cannot be written or would replace another one, CheckpointError and ExportError.

    Args:
        files: at most one file for each ending of FORMATS and for .safetensors; or a single .pt file.
        timestep: timestep of z in programs of a time-dependent encoder; None: the encoder is another one.
    """
    by_ending = {file.suffix.lower(): file for file in files}
    programs, weights = [file for ending, file in by_ending.items() if ending in FORMATS], by_ending.get(".safetensors")
    for file in files:
        check_writable(file)
        if file.name in read_sums(file.parent):
            raise ConfigError(f"{file} is a checkpoint of a run: export to another file")
    if weights:
        check_no_cameras(trained.config, str(weights))
        check_card(weights.parent)
    if ".pt" in by_ending and timestep is not None:
        raise ConfigError(f"--timestep {timestep} is not for {files[0]}, which holds all timesteps: remove it")
    if programs or timestep is not None:
        check_timestep(trained.config, timestep)
    trained.statistics()  # all files need them
    if rank() > 0:
        return
    if ".pt" in by_ending:
        save_checkpoint(files[0], reduced_checkpoint(trained))
        print(files[0])
    if programs:
        encoder, notes = trained_encoder(trained, timestep=timestep), {"checkpoint": trained.digest}
        notes |= {} if timestep is None else {"timestep": str(timestep)}
        for file, difference in export_encoder(encoder, programs, notes).items():
            print(f"{file}  (its features differ from the model's by at most {difference:.1g})")
    if weights:
        card = weights.parent / CARD
        save_weights(weights, trained)
        write_text(card, model_card(trained, weights, programs, timestep))
        print(weights, card, sep="\n")
