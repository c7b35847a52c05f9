"""What a run reports while it trains: losses, evaluations, and at the end the table."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from training.experiment import Experiment, batch_norm_batch_size
from training.judge import baselines, config_protocols, encode_with, judge, sample_grid, save_png
from training.latents import latents, projector_points
from training.state import Summary, TrainState
from training.step import learning_rates
from utils.config_file import flat, result_digest
from utils.device import memory_for, peak_memory_mb
from utils.distributed import from_rank_0
from utils.files import write_text, writing_to
from utils.logging import PhaseTimer, phases
from utils.run_log import RunLog

logger = logging.getLogger(__name__)


RESULTS = "results.json"  # the closing table, with the config and the step that it belongs to


def read_results(folder: Path) -> dict[str, Any]:
    """What the last evaluation of the run in `folder` left; empty where there is nothing that can be read."""
    try:
        results = dict(json.loads((folder / RESULTS).read_text()))
        return results if isinstance(results.get("table"), dict) else {}
    except (OSError, ValueError, TypeError):
        return {}


def not_finite(experiment: Experiment, step: int, summary: Summary, saved_step: int | None) -> str:
    """Why the run ends."""
    encoder_lr, decoder_lr = learning_rates(experiment, step - 1)
    folder = Path(experiment.config.output_dir) / "checkpoints"
    last = f"The last checkpoint is of step {saved_step}, in {folder}"
    saved = "Nothing is saved yet" if saved_step is None else last
    return (
        f"{summary.most_in_a_row} steps in a row, before step {step}, had gradients that are not finite, at learning "
        f"rates {encoder_lr:g} (encoder) and {decoder_lr:g} (decoder), and changed nothing. {saved}: look at the "
        "images, or take lower learning rates in another output_dir"
    )


def report(
    experiment: Experiment, state: TrainState, log: RunLog | None, timer: PhaseTimer, steps: int, grad_norm: Tensor
) -> Summary:
    """One report on the steps since the last one, of which `steps` were taken since this process started."""
    with timer.phase("wait for the device"):  # the steps themselves do not
        summary, last_grad_norm = state.tally.take(), grad_norm.item()
    if not log:
        return summary
    total, by_phase = timer.take()
    training_s = total - by_phase.get("evaluation", 0) - by_phase.get("checkpoint", 0)
    encoder_lr, decoder_lr = learning_rates(experiment, state.step - 1)
    values = {
        "epoch": state.step / experiment.loader.steps_per_epoch,
        "loss": summary.loss,
        "grad_norm": last_grad_norm,
        "skipped_steps": summary.skipped,
        "lr/encoder": encoder_lr,
        "lr/decoder": decoder_lr,
        "ema_decay": state.ema.decay(),
        "images_per_s": steps * experiment.config.training.batch_size / training_s,
        "peak_memory_mb": peak_memory_mb(experiment.device),
        **{f"seconds/{name}": seconds for name, seconds in by_phase.items()},
    }
    log.report("train", state.step, values)
    return summary


def evaluation_due(experiment: Experiment, step: int) -> bool:
    """Every `evaluation.every` epochs and at the end."""
    epoch, step_of_epoch = divmod(step, experiment.loader.steps_per_epoch)
    periodic = step_of_epoch == 0 and epoch > 0 and epoch % experiment.config.evaluation.every == 0
    return periodic or step == experiment.total_steps


def evaluate_if_due(
    experiment: Experiment, state: TrainState, folder: Path, log: RunLog | None, timer: PhaseTimer
) -> None:
    """Judge the EMA encoder and draw a grid of samples where that is due and was not done.

    At the end the untrained encoder and the raw pixels are judged beside it, for the closing table. All processes
    work; the one that has a log writes.
    """
    epoch, at_end = state.step // experiment.loader.steps_per_epoch, state.step == experiment.total_steps
    if not evaluation_due(experiment, state.step):
        return
    reported = from_rank_0(log is not None and log.has("evaluation", state.step))
    if reported and not at_end:
        return
    phases.info("evaluation at step %d", state.step)
    with timer.phase("evaluation"):
        soda, table, z, grid = state.ema.module, {}, None, None
        protocols = [] if experiment.test is None else config_protocols(experiment)
        if protocols:
            encoders = {"trained": encode_with(experiment, soda)} | (baselines(experiment) if at_end else {})
            smaller = max(1, experiment.config.evaluation.batch_size // 2)
            with memory_for(lambda: f"set evaluation.batch_size={smaller}"):
                table = judge(experiment, encoders, protocols)
                z = latents(experiment, soda, experiment.test) if at_end and experiment.test is not None else None
        if experiment.config.sampling.num_images:
            with memory_for(lambda: f"set sampling.num_images={experiment.config.sampling.num_images // 2}"):
                grid = sample_grid(experiment, soda)
        if log is None:
            return
        values: dict[str, float] = {"epoch": epoch}
        for protocol in protocols:
            accuracies = table[str(protocol)]["trained"]
            values |= {f"{protocol.kind}_{name}": accuracy for name, accuracy in accuracies.items()}
            logger.info("epoch %d, %s: top-1 %.1f, top-3 %.1f", epoch, protocol, *accuracies.values())
        if grid is not None:
            with writing_to(folder):
                save_png(folder / "samples" / f"epoch_{epoch:04d}.png", grid)
            log.image("samples", state.step, grid)
        if not reported:
            log.report("evaluation", state.step, values, **{protocol.kind: str(protocol) for protocol in protocols})
        if at_end:
            # TensorBoard keeps the first that it sees of a run, whose epochs may be raised later: those are a metric.
            hyperparameters = {
                name: value for name, value in flat(experiment.config).items() if name != "training.epochs"
            }
            if z is not None:
                log.embedding("latents", state.step, partial(projector_points, experiment, z))
            log.hyperparameters(hyperparameters, [f"evaluation/{name}" for name in values])
            results = {
                "config_digest": result_digest(experiment.config),
                "step": state.step,
                "batch_norm_batch_size": batch_norm_batch_size(experiment),
                "table": table,
            }
            with writing_to(folder):
                write_text(folder / RESULTS, json.dumps(results, indent=1) + "\n")
