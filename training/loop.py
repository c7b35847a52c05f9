"""The training loop: steps, reports, checkpoints and evaluations until the last epoch."""

import json
import logging
import sys
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from datasets import DatasetError
from training.experiment import Experiment
from training.judge import baselines, config_protocols, encode_with, judge, sample_grid, save_png
from training.state import Summary, TrainState
from training.step import learning_rates, train_step, training_pixels
from utils import signals
from utils.checkpoint_writer import CheckpointInterval, CheckpointWriter
from utils.config_file import result_digest
from utils.device import choose_compile, memory_for, peak_memory_mb
from utils.distributed import Agreement, SharedError, backend, exchange, from_rank_0, rank, world_size
from utils.files import write_text, writing_to
from utils.logging import METRICS, PhaseTimer, RunLog, phases
from utils.parallel import data_parallel
from utils.randomness import CHUNK

logger = logging.getLogger(__name__)

MAX_SKIPPED = 20  # steps in a row whose gradients are not finite
RESULTS = "results.json"  # the closing table, with the config and the step that it belongs to


def read_results(folder: Path) -> dict[str, Any]:
    """What the last evaluation of the run in `folder` left; empty where there is nothing that can be read."""
    try:
        return dict(json.loads((folder / RESULTS).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def train(experiment: Experiment, state: TrainState, folder: Path, resumed_from: Path | None) -> None:
    """Go on from `state` to the last step, writing checkpoints, samples and reports into `folder`.

    Every process trains its share of each batch; rank 0 writes. Raises DatasetError, FolderError, OutOfMemoryError,
    SharedError (of numbers that are not finite), and Stopped after a signal, when what was reached is saved.
    """
    config = experiment.config.training
    steps_per_epoch, total_steps = experiment.loader.steps_per_epoch, experiment.total_steps
    if choose_compile(config.compile, experiment.device):
        state.soda.compile()  # in place, so that names stay; the EMA has copied the eager model
    state.wrapped = data_parallel(state.soda)
    log = RunLog(folder, state.step) if rank() == 0 else None
    writer = CheckpointWriter(folder / "checkpoints", resumed_from, flush_first=folder / METRICS) if log else None
    timer = PhaseTimer()
    if log:
        log.text("config", f"```yaml\n{experiment.config.to_yaml()}```", state.step)
    interval, agree = CheckpointInterval(config.checkpoint_every, steps_per_epoch), Agreement()
    first_step = saved_step = state.step
    bar = tqdm(
        total=total_steps * config.batch_size,
        initial=state.step * config.batch_size,
        desc="training",
        unit="img",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=log is None,
    )

    def save(keep_as: str | None = None, alone: bool = False) -> None:
        """All processes call it together, or one `alone`."""
        nonlocal saved_step
        saved_step = state.step
        with timer.phase("checkpoint"):
            contents = state.state_dict(alone)
            if writer:
                contents |= {"config": experiment.config.to_yaml(), "data": experiment.data_digest}
                writer.save(contents, keep_as)

    def evaluate() -> None:
        with memory_for(lambda: f"set evaluation.batch_size={max(1, experiment.config.evaluation.batch_size // 2)}"):
            evaluate_if_due(experiment, state, folder, log, timer)

    if world_size() > 1:
        mine = config.batch_size // world_size()
        logger.info("%d processes, %d images of each batch each, gradients by %s", world_size(), mine, backend())
    if batch_norm_batch_size(experiment) < config.batch_size:
        logger.info("BatchNorm normalises over %d images at a time", batch_norm_batch_size(experiment))
    with writer or nullcontext(), log or nullcontext(), closing(training_pixels(experiment, state.step)) as pixels, bar:
        # An evaluation that a killed run did not finish is made up for before the next step.
        evaluate()
        phases.info("training from step %d to %d", state.step, total_steps)
        while state.step < total_steps:
            with signals.deferred():
                try:
                    with memory_for(lambda: less_memory(experiment)):
                        _, grad_norm = train_step(experiment, state, pixels, timer)
                except DatasetError:  # which the others have not met
                    save(alone=True)
                    raise
                bar.update(config.batch_size)
                epoch, step_of_epoch = divmod(state.step, steps_per_epoch)
                at_end = state.step == total_steps
                if state.step % config.log_every == 0 or at_end:
                    summary = report(experiment, state, log, timer, state.step - first_step, grad_norm)
                    bar.set_postfix(loss=f"{summary.loss:.4f}", refresh=False)
                    first_step = state.step
                    if summary.most_in_a_row >= MAX_SKIPPED:
                        raise SharedError(not_finite(experiment, state.step, summary, saved_step))
                if writer:
                    writer.check()
                signal_number, overdue = agree(signals.received(), rank() == 0 and interval.overdue())
                evaluation = evaluation_due(experiment, state.step)
                if evaluation and not signal_number:  # nobody is to be kept from stopping by minutes of judging
                    signal_number = max(exchange(signals.received()))
                keep = config.keep_every is not None and step_of_epoch == 0 and epoch % config.keep_every == 0
                if interval.due(state.step) or overdue or keep or evaluation or signal_number:
                    save(f"epoch_{epoch:04d}.pt" if keep else None)
                if signal_number:
                    if writer:
                        writer.wait()
                    exchange()  # a launcher that sees one process end gives the others little time
                    phases.info("stopped at step %d, saved", state.step)
                    raise signals.Stopped(signal_number, f" at step {state.step}, which is saved")
            if evaluation:
                evaluate()
                phases.info("evaluated")
        agree.wait()
        phases.info("finished")


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


def not_finite(experiment: Experiment, step: int, summary: Summary, saved_step: int) -> str:
    """Why the run ends."""
    encoder_lr, decoder_lr = learning_rates(experiment, step - 1)
    return (
        f"{summary.most_in_a_row} steps in a row, before step {step}, had gradients that are not finite, at learning "
        f"rates {encoder_lr:g} (encoder) and {decoder_lr:g} (decoder), and changed nothing. The last checkpoint is of "
        f"step {saved_step}, in {Path(experiment.config.output_dir) / 'checkpoints'}: look at the images, or take "
        "lower learning rates in another output_dir"
    )


def report(
    experiment: Experiment, state: TrainState, log: RunLog | None, timer: PhaseTimer, steps: int, grad_norm: Tensor
) -> Summary:
    """One report on the steps since the last one, of which `steps` were taken since this process started."""
    with timer.phase("wait for the device"):  # the steps themselves do not
        summary, last_grad_norm = state.tally.take(), grad_norm.item()
    if not log:
        return summary
    total, phases = timer.take()
    training_s = total - phases.get("evaluation", 0) - phases.get("checkpoint", 0)
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
        **{f"seconds/{name}": seconds for name, seconds in phases.items()},
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
    signals.obey()  # the state is saved
    reported = from_rank_0(log is not None and log.has("evaluation", state.step))
    if reported and not at_end:
        return
    phases.info("evaluation at step %d", state.step)
    with timer.phase("evaluation"):
        soda, table, grid = state.ema.module, {}, None
        protocols = [] if experiment.test is None else config_protocols(experiment)
        if protocols:
            encoders = {"trained": encode_with(experiment, soda)} | (baselines(experiment) if at_end else {})
            table = judge(experiment, encoders, protocols)
        if experiment.config.sampling.num_images:
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
            results = {
                "config_digest": result_digest(experiment.config),
                "step": state.step,
                "batch_norm_batch_size": batch_norm_batch_size(experiment),
                "table": table,
            }
            with writing_to(folder):
                write_text(folder / RESULTS, json.dumps(results, indent=1) + "\n")
