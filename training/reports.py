"""What a run reports while it trains: losses, evaluations, and at the end the table."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import SODA
from training.experiment import Experiment, batch_norm_batch_size
from training.judge import baselines, config_protocols, encode_with, judge, latents, sample_grid, save_png
from training.state import Summary, TrainState
from training.step import learning_rates
from utils.config_file import flat, result_digest
from utils.device import memory_for, peak_memory_mb
from utils.distributed import from_rank_0
from utils.files import write_text, writing_to
from utils.logging import PhaseTimer, phases
from utils.randomness import generator
from utils.run_log import SPRITE_PIXELS, RunLog

logger = logging.getLogger(__name__)


MAX_POINTS = 10_000  # in the projector, which sends all of them to the browser
THUMBNAIL = 64  # pixels
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


def projector_points(experiment: Experiment, soda: SODA) -> tuple[Tensor, list[str], list[list[str]], Tensor]:
    """Test latents with class, place and thumbnail, as `RunLog.embedding` takes them; all processes encode."""
    test = experiment.test
    assert test is not None and test.labels is not None, "test images have labels"
    z, labels = latents(experiment, soda, test), test.labels
    chosen = (
        torch.randperm(len(test), generator=generator(experiment.config.seed, "projector"))[:MAX_POINTS].sort().values
    )
    size = min(test.shape[-1], THUMBNAIL, SPRITE_PIXELS // math.ceil(math.sqrt(len(chosen))))
    pixels = [F.adaptive_avg_pool2d(batch.float().cpu() / 255, size) for batch in test.batches(chosen.split(256))]
    rows = [[test.classes[int(labels[i])], f"test:{i}"] for i in chosen.tolist()]
    return z[chosen.to(z.device)].cpu(), ["class", "image"], rows, torch.cat(pixels)


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
        soda, table, grid = state.ema.module, {}, None
        protocols = [] if experiment.test is None else config_protocols(experiment)
        if protocols:
            encoders = {"trained": encode_with(experiment, soda)} | (baselines(experiment) if at_end else {})
            smaller = max(1, experiment.config.evaluation.batch_size // 2)
            with memory_for(lambda: f"set evaluation.batch_size={smaller}"):
                table = judge(experiment, encoders, protocols)
        if experiment.config.sampling.num_images:
            with memory_for(lambda: f"set sampling.num_images={experiment.config.sampling.num_images // 2}"):
                grid = sample_grid(experiment, soda)
        points = projector_points(experiment, soda) if at_end and experiment.test is not None else None
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
        if points is not None:
            log.embedding("latents", state.step, *points)
        if not reported:
            log.report("evaluation", state.step, values, **{protocol.kind: str(protocol) for protocol in protocols})
        if at_end:
            # TensorBoard keeps the first that it sees of a run, whose epochs may be raised later: those are a metric.
            hyperparameters = {
                name: value for name, value in flat(experiment.config).items() if name != "training.epochs"
            }
            log.hyperparameters(hyperparameters, [f"evaluation/{name}" for name in values])
            results = {
                "config_digest": result_digest(experiment.config),
                "step": state.step,
                "batch_norm_batch_size": batch_norm_batch_size(experiment),
                "table": table,
            }
            with writing_to(folder):
                write_text(folder / RESULTS, json.dumps(results, indent=1) + "\n")
