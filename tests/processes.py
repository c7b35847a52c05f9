"""Programs that tests run in two processes, as `python -m tests.processes <program> <folder or arguments>`."""

import contextlib
import io
import itertools
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import embed as embed_program
import finetune as finetune_program
import sample as sample_program
import test as judge_program
import train as train_program
from analysis.prior import priors_of
from config.errors import ConfigError
from config.reading import load_config
from datasets.views import Views
from evaluation import dci
from evaluation.codec import Codec
from evaluation.encoders import baselines, encode_with
from evaluation.judge import judge
from evaluation.measures import MEASURES, disentanglement, few_labels
from evaluation.measures.base import Inputs
from evaluation.measures.subjects import open_others, subjects_of
from evaluation.novel_views import baselines as view_baselines
from evaluation.novel_views import judging as view_judging
from evaluation.protocols import config_protocols
from evaluation.spectrum import effective_rank
from experiment import timesteps
from experiment.opening import Experiment, open_experiment
from tests.conftest import digits_args
from tests.posed import posed_experiment, soda_without_zeros, write_objects
from training.evaluating import latents
from training.sample_grid import sample_grid
from training.state import TrainState, initial_state
from training.step import train_step, training_pixels
from utils.cli import gather_user_errors, run
from utils.distributed import data_parallel
from utils.distributed.collectives import (
    all_equal,
    all_reduce,
    broadcast_object,
    destroy_process_groups,
    first_on_each_node,
)
from utils.distributed.processes import my_range, rank, world_size
from utils.logging import PhaseTimer
from utils.run_folder import folder as run_folder
from utils.run_folder.checkpoint_writer import CheckpointWriter

PROGRAMS = {
    "train.py": train_program,
    "finetune.py": finetune_program,
    "test.py": judge_program,
    "sample.py": sample_program,
    "embed.py": embed_program,
}

# Learning rates are low because AdamW and ReLU amplify rounding errors. AdamW divides by the gradient's size, so only
# the sign of a near-zero gradient matters. max_grad_norm is high so that the gradients are compared without clipping.
COMPARABLE = (
    "decoder.dropout=0.0",
    "encoder.width=8",
    "optimizer.max_grad_norm=1e9",
    "optimizer.encoder_lr=1e-4",
    "optimizer.decoder_lr=1e-4",
)


def prepare(folder: Path, *overrides: str) -> tuple[Experiment, TrainState]:
    """Opens a tiny run on digits and returns (experiment, initial state).

    Random numbers are added to all parameters, so that no gradient is zero.
    """
    _, path, *rest = digits_args(folder, *COMPARABLE, *overrides)
    experiment = open_experiment(load_config(path, rest))
    torch.set_float32_matmul_precision("highest")  # on a GPU, choose_device allows TensorFloat-32
    torch.backends.cudnn.benchmark = False
    state = initial_state(experiment)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in state.soda.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return experiment, state


def digest(values: dict[str, Tensor]) -> bytes:
    """Returns the bytes of all tensors, joined."""
    return b"".join(value.cpu().numpy().tobytes() for value in values.values())


def training(
    folder: Path, steps: int, *overrides: str, fixed_statistics: bool = False, compiled: bool = False
) -> dict[str, Any]:
    """Trains for `steps` steps and returns the values that the tests compare.

    Args:
        fixed_statistics: keep the model in evaluation mode, so that BatchNorm uses its running statistics.
        compiled: compile the model.

    Returns:
        The loss of each global batch, the gradients and buffers of the first step, and the keys of the state dict.
        Also the number of compiled graphs and the graph breaks, DDP's settings, and whether the EMA is the same on all
        ranks.
    """
    experiment, state = prepare(folder, *overrides)
    if fixed_statistics:
        state.soda.eval()
        state.soda.train = lambda mode=True: None
    counters.clear()
    if compiled:
        state.soda.compile()
    state.wrapped = data_parallel.data_parallel(state.soda)
    found: dict[str, Any] = {"losses": []}

    def look(*_: Any) -> None:
        if state.step == 0:
            trained = {name: p for name, p in state.soda.named_parameters() if p.requires_grad}
            found["gradients"] = {name: p.grad.cpu().clone() for name, p in trained.items()}

    state.optimizer.register_step_pre_hook(look)
    pixels = training_pixels(experiment, 0)
    for step in range(steps):
        loss, _ = train_step(experiment, state, pixels, PhaseTimer())
        found["losses"].append(all_reduce(loss).item() / world_size())
        if step == 0:
            found["buffers"] = {name: buffer.cpu().clone() for name, buffer in state.soda.named_buffers()}
    found["keys"] = list(state.soda.state_dict())
    found["graphs"] = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
    if world_size() > 1:
        ddp = state.wrapped
        sends_buffers = getattr(ddp, "forward_sync_buffers", None) or ddp.broadcast_buffers
        found["DDP"] = (ddp.static_graph, ddp.gradient_as_bucket_view, sends_buffers)
    found["EMA is the same everywhere"] = all_equal(digest(state.ema.ema_model.state_dict()))
    return found


def adaptive(folder: Path) -> dict[str, Any]:
    """Trains for 7 steps with adaptive timesteps, whose density is renewed twice.

    After each step, all ranks load the history that rank 0 would save, as when a run is resumed.
    """
    end_step = timesteps.AdaptiveSampler.end_step

    def end_and_resume(sampler: timesteps.AdaptiveSampler, steps_done: int) -> None:
        end_step(sampler, steps_done)
        sampler.load_state_dict(broadcast_object(sampler.state_dict()))

    with (
        mock.patch.object(timesteps, "RENEW_EVERY", 3),
        mock.patch.object(timesteps.AdaptiveSampler, "end_step", end_and_resume),
    ):
        return training(folder, 7, "training.timesteps.sampling=adaptive")


def micro_batches(folder: Path) -> list[dict[str, Any]]:
    """Trains three times for 6 steps with fixed BatchNorm statistics: with 1, 2 and 4 micro-batches per process.

    Adds to each result of `training` the key "unreduced": the number of backward passes without a reduction.
    """
    found, unreduced = [], 0
    no_sync = DistributedDataParallel.no_sync

    def counting(self: Any) -> Any:
        nonlocal unreduced
        unreduced += 1
        return no_sync(self)

    with mock.patch.object(DistributedDataParallel, "no_sync", counting):
        for parts in (1, 2, 4):
            unreduced = 0
            size = 64 // world_size() // parts
            found.append(training(folder, 6, f"training.micro_batch_size={size}", fixed_statistics=True))
            found[-1]["unreduced"] = unreduced
    return found


def unsynchronised(folder: Path) -> dict[str, Any]:
    """Trains for 5 steps with torch's own BatchNorm, whose statistics cover the samples of one process only."""
    convert = data_parallel.convert_batch_norm
    data_parallel.convert_batch_norm = lambda module: None
    try:
        return training(folder, 5)
    finally:
        data_parallel.convert_batch_norm = convert


LAYOUTS = [  # dtype and memory format
    (torch.float32, torch.contiguous_format),
    (torch.float32, torch.channels_last),
    (torch.bfloat16, torch.contiguous_format),
    (torch.bfloat16, torch.channels_last),
]


def batch_norm(
    make: type[nn.BatchNorm2d], dtype: torch.dtype, layout: torch.memory_format, device: str, exact: bool
) -> dict[str, Tensor]:
    """Runs BatchNorm forward and backward twice, on this process's share of 8 samples.

    The values of the first pass are far from zero. Returns outputs, gradients and buffers for all 8 samples, and an
    output in evaluation mode.

    Args:
        exact: True: computes in float64, from values that are rounded to `dtype`; False: computes in `dtype`.
    """
    compute = torch.float64 if exact else dtype
    norm = make(6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    norm.to(device, torch.float64 if exact else torch.float32)
    found: dict[str, Tensor] = {}
    for step, centre in enumerate((300.0, 0.5)):
        values = torch.randn(8, 6, 5, 3, generator=generator) * torch.arange(1, 7)[:, None, None] + centre
        weights = torch.randn(values.shape, generator=generator)
        mine = slice(my_range(8).start, my_range(8).stop)
        x = values[mine].to(dtype).to(device, compute, memory_format=layout).requires_grad_()
        y = norm(x)
        norm.zero_grad()
        y.backward(weights[mine].to(dtype).to(device, compute, memory_format=layout))
        assert x.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
        for name, part in (("y", y.detach()), ("x gradient", x.grad)):
            whole = torch.zeros(values.shape, device=device, dtype=torch.float64)
            whole[mine] = part
            found[f"{name}, step {step}"] = all_reduce(whole)
        for name, parameter in norm.named_parameters():
            assert parameter.grad is not None
            found[f"{name} gradient, step {step}"] = all_reduce(parameter.grad)
        found |= {f"{name}, step {step}": buffer.clone() for name, buffer in norm.named_buffers()}
        assert y.dtype == x.grad.dtype == compute and y.is_contiguous(memory_format=layout)
    found["evaluation"] = norm.eval()(torch.ones(1, 6, 2, 2, device=device, dtype=norm.weight.dtype)).detach()
    return {name: value.cpu().double() for name, value in found.items()}


def batch_norms(make: type[nn.BatchNorm2d], device: str = "cpu", exact: bool = False) -> list[dict[str, Tensor]]:
    """Returns the results of `batch_norm` for every number format and memory layout."""
    return [batch_norm(make, dtype, layout, device, exact) for dtype, layout in LAYOUTS]


def judging(folder: Path, *overrides: str) -> tuple[Any, Tensor, float]:
    """Judges a random encoder and the baselines. Returns (table of accuracies, sample grid, effective rank)."""
    experiment, state = prepare(folder, *overrides)
    encoders = {"random": encode_with(experiment, state.soda), **baselines(experiment)}
    table = judge(experiment, encoders, config_protocols(experiment.config))
    _, z = latents(experiment, state.soda.encoder)
    return table, sample_grid(experiment, state.soda), effective_rank(z)


def measuring(folder: Path) -> dict[str, Any]:
    """Returns the rows of the measures whose work the ranks divide, for a random encoder and the raw pixels."""
    experiment, state = prepare(folder, "evaluation.batch_size=100")
    codec = Codec(experiment, state.soda, 0)
    subjects = subjects_of(codec, Inputs(open_others(None, experiment), num_samples=20), priors_of(codec, None))
    smaller: dict[Any, dict[str, Any]] = {
        few_labels: {"DRAWS": 3, "COUNTS": (1,)},
        disentanglement: {"NUM_TRAIN": 60, "NUM_TEST": 20},
        dci: {"TREES": 2},
    }
    with contextlib.ExitStack() as stack:
        for module, constants in smaller.items():
            stack.enter_context(mock.patch.multiple(module, **constants))
        names = ("few_labels", "anomalies", "disentanglement", "uniformity", "prior", "memorization")
        return {name: MEASURES[name]().measure(subjects).rows for name in names}


def turns(folder: Path) -> dict[str, Any]:
    """Runs `first_on_each_node` with work that writes the rank to a file, then with work that fails on the last rank.

    Returns the result of the first work, the ranks in the order of work, the exit status, and the printed text.
    """
    log = folder / "turns"

    def work() -> int:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{rank()} ")
        return rank()

    def fail() -> None:
        if rank() == world_size() - 1:
            raise ConfigError("the last process failed")

    mine, printed, status = first_on_each_node(work), io.StringIO(), None
    with contextlib.redirect_stderr(printed):
        try:
            with gather_user_errors():
                first_on_each_node(fail)
        except SystemExit as ended:
            status = ended.code
    return {"mine": mine, "log": log.read_text(), "status": status, "printed": printed.getvalue()}


def novel_views(folder: Path) -> dict[str, Any]:
    """Returns the scores of novel views of an untrained model and of the baselines, for twelve targets."""
    root = folder / f"objects_{rank()}"
    root.parent.mkdir(exist_ok=True)
    experiment = posed_experiment(write_objects(root))
    soda = soda_without_zeros(experiment)
    with mock.patch.object(view_judging, "BATCH", 5), mock.patch.object(view_baselines, "PART", 5):
        models = {"model": (2, view_judging.view_sampler(experiment, soda, 0, 2))}
        return view_judging.score_views(experiment, models, 100, 0).rows


def numbers(folder: Path) -> dict[str, Any]:
    """Returns all results that must not depend on the number of processes."""
    return {
        "micro-batches": micro_batches(folder),
        "training": training(folder, 5),
        "frozen encoder": training(folder, 2, "encoder.frozen=true"),
        "time-dependent": training(folder, 2, "encoder.time_dependent=true"),
        "adaptive": adaptive(folder),
        # A batch size of 100 gives 15 training and 4 test batches, and 2000 gives one of each. Six images are one and a
        # half chunks of 4 (CHUNK), the unit in which images are divided among processes.
        "judging": [
            judging(folder, f"evaluation.batch_size={size}", "sampling.num_images=6", "sampling.eta=1.0")
            for size in (100, 2000)
        ],
        "measuring": measuring(folder),
        "novel views": novel_views(folder),
    }


def on_cuda(folder: Path) -> dict[str, Any]:
    """Trains, eagerly and compiled, and runs BatchNorm on one GPU that all processes share, without TensorFloat-32."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        overrides = ("device=cuda", "distributed.backend=gloo")
        found = {compiled: training(folder, 5, *overrides, compiled=compiled) for compiled in (False, True)}
        frozen = training(folder, 2, *overrides, "encoder.frozen=true")
    return {
        "training": found[False],
        "frozen encoder": frozen,
        "compiled": found[True],
        "batch norms": batch_norms(data_parallel.GlobalBatchNorm2d, "cuda"),
    }


def bad_numbers(arguments: list[str]) -> None:
    """Runs train.py with a slow disk (3 s per checkpoint) and, from step 8 on, a NaN in one image of rank 1."""
    write, pair, calls = CheckpointWriter._write, Views.pair, itertools.count()

    def slowly(*args: Any) -> None:
        time.sleep(3)
        write(*args)

    def with_nan(*args: Any) -> Any:
        x_source, x_start = pair(*args)
        if next(calls) >= 8 and rank() == 1:
            x_start[0, 0, 0, 0] = float("nan")
        return x_source, x_start

    setattr(CheckpointWriter, "_write", slowly)  # noqa: B010 (mypy)
    setattr(Views, "pair", with_nan)  # noqa: B010
    run(lambda: train_program.main(arguments))


def mistakes(cases: list[tuple[str, list[str]]]) -> list[tuple[Any, str]]:
    """Runs each (program, arguments) and returns its (exit status, printed text).

    `{rank}` in the arguments is replaced by the rank of this process.
    """
    found = []
    for program, arguments in cases:
        printed = io.StringIO()
        status: Any = None
        logging.root.handlers.clear()  # the handlers of the previous program write to its stream
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            try:
                status = PROGRAMS[program].main([argument.replace("{rank}", str(rank())) for argument in arguments])
            except SystemExit as ended:
                status = ended.code
        found.append((status, printed.getvalue()))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, place = sys.argv[1], Path(sys.argv[2])
    results: Any
    if what == "cuda":
        results = on_cuda(place)
    elif what == "compiled":
        # Small buckets: DDP gets several of them, as for a large model. The compiler traces one graph and compiles it
        # in parts, one for each bucket.
        patch = partial(data_parallel._DataParallel, bucket_cap_mb=1)
        data_parallel._DataParallel = patch  # type: ignore[misc,assignment]
        results = training(place, 20, compiled=True)
    elif what == "bad numbers":
        bad_numbers(sys.argv[2:])
    elif what == "mistakes":
        os.chdir(place / f"disk{rank()}")
        with mock.patch.object(run_folder, "SHARING_SECONDS", 2):
            results = mistakes(torch.load(place / "cases.pt"))
    elif what == "pictures":
        for index, arguments in enumerate(torch.load(place / "cases.pt")):
            assert sample_program.main([*arguments, "--out", str(place / "together" / f"{index}.png")]) == 0
        results = None
    else:
        results = numbers(place) | {
            "unsynchronised": unsynchronised(place),
            "batch norms": batch_norms(data_parallel.GlobalBatchNorm2d),
            "turns": turns(place),
        }
    torch.save(results, place / f"rank{rank()}.pt")
    destroy_process_groups()
