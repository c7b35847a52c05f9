"""Reports of a run in metrics.jsonl, TensorBoard and results.json. To log another scalar, add it to `values`."""

import logging
from collections.abc import Mapping
from pathlib import Path

from config.keys import flat
from experiment.opening import Experiment
from experiment.shares import batch_norm_batch_size
from training.evaluating import Evaluation
from training.projector import projector_points
from training.sample_grid import save_png
from training.saving import Opened
from training.state import RunState, Summary
from utils.device import peak_memory_mb
from utils.files import writing_to
from utils.logging import PhaseTimer
from utils.run_folder.results import write_results
from utils.run_folder.run_log import GLANCE, RunLog, tag_of

MIN_VARIANCE = 1e-12  # TensorBoard shows smaller eigenvalues, also 0, as this value

logger = logging.getLogger(__name__)


def record_steps(
    log: RunLog,
    experiment: Opened,
    state: RunState,
    rates: Mapping[str, float],
    summary: Summary,
    grad_norm: float,
    timer: PhaseTimer,
    num_steps: int,
) -> None:
    """Reports the steps since the last report.

    Args:
        rates: learning rates by name.
        grad_norm: gradient norm of the last step, before clipping.
        timer: timer of the phases since the last report. It is reset.
        num_steps: steps that this process has run since the last report.
    """
    total, by_phase = timer.take()
    training_s = total - sum(by_phase.get(name, 0) for name in ("evaluation", "checkpoint", "pseudo-labels"))
    values = {
        "epoch": state.step / experiment.steps_per_epoch,
        **summary.losses,
        "grad_norm": grad_norm,
        "skipped_steps": summary.skipped,
        **{f"lr/{name}": rate for name, rate in rates.items()},
        "ema_decay": state.ema.get_current_decay(),
        "images_per_s": num_steps * experiment.config.training.batch_size / training_s,
        "hours_left": (experiment.total_steps - state.step) * training_s / num_steps / 3600,
        "peak_memory_mb": peak_memory_mb(experiment.device),
        **{f"seconds/{name}": seconds for name, seconds in by_phase.items()},
    }
    log.report("train", state.step, values)


def record_evaluation(log: RunLog, experiment: Experiment, found: Evaluation, folder: Path) -> None:
    """Logs the accuracies and the spectrum of the latents, and writes the grid of samples.

    After the last step, also writes results.json and the test latents. Writes no second report if the log already has
    one of this evaluation. Raises FolderError.
    """
    epoch, rest = divmod(found.step, experiment.steps_per_epoch)
    values: dict[str, float] = {"epoch": found.step / experiment.steps_per_epoch, **found.measures}
    measures = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in found.measures.items())
    time = f"step {found.step}" if rest else f"epoch {epoch}"
    picture = f"step_{found.step:06d}.png" if rest else f"epoch_{epoch:04d}.png"
    logger.info("%s, %s with %d dimensions: %s", time, found.z_name, found.z.shape[1], measures)
    for protocol in found.protocols:
        accuracies = found.table[str(protocol)]["trained"]
        values |= {f"{protocol.logged_as}_{name}": accuracy for name, accuracy in accuracies.items()}
        logger.info("%s, %s: top-1 %.1f, top-3 %.1f", time, protocol, *accuracies.values())
    if found.grid is not None:
        with writing_to(folder):
            save_png(folder / "samples" / picture, found.grid)
        log.image(f"{GLANCE}/samples", found.step, found.grid)
    if not log.has("evaluation", found.step):
        protocols = {each.logged_as: str(each) for each in found.protocols}
        # Logarithms, because the largest eigenvalues would hide the others.
        log.histogram("evaluation/log10_spectrum", found.step, found.spectrum.clamp(min=MIN_VARIANCE).log10())
        log.report("evaluation", found.step, values, **protocols, spectrum=found.spectrum.tolist())
    if found.at_end:
        _record_end(log, experiment, found, folder, metrics=[tag_of("evaluation", name) for name in values])


def _record_end(log: RunLog, experiment: Experiment, found: Evaluation, folder: Path, metrics: list[str]) -> None:
    config, test = experiment.config, experiment.test
    if test is not None and test.labels is not None:
        log.embedding("latents", found.step, lambda: projector_points(test, found.chosen, found.z))
    # TensorBoard keeps the first settings that it sees of a run. training.epochs may be raised later, so the metric
    # "epoch" shows it instead.
    log.hyperparameters({key: value for key, value in flat(config).items() if key != "training.epochs"}, metrics)
    normalised_over = batch_norm_batch_size(config.training)
    write_results(
        folder, config, found.step, experiment.digests, batch_norm_batch_size=normalised_over, table=found.table
    )
