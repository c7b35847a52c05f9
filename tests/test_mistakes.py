"""Tests of user mistakes.

Every mistake ends with one line that says what to do and with status 2 on all ranks. No file is written or lost.
"""

import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import train as train_program
from config.reading import load_config
from tests.conftest import TWO_PROCESSES, digits_args, launch, launch_two, write_images
from tests.processes import PROGRAMS
from tests.test_checkpoint import Malicious
from utils.files import lock_file


@dataclass(frozen=True)
class Mistake:
    """A wrong command line, and the error that it must cause.

    Attributes:
        expected: part of the last line that is printed.
        arguments: arguments of the program; `{place}` and `{rank}` in them are replaced.
        program: file name of the program.
        processes: smallest number of processes in which the mistake can happen.
    """

    expected: str
    arguments: list[str]
    program: str = "train.py"
    processes: int = 1


def folder(name: str) -> list[str]:
    """Returns the overrides that select the image folder `name`."""
    return ["data.name=folder", f"data.root={{place}}/images/{name}", "data.cache_dir={place}/../cache"]


def checkpoint(name: str) -> list[str]:
    """Returns the options that select the checkpoint `name`."""
    return ["--checkpoint", f"{{place}}/checkpoints/{name}.pt"]


UNMOVED = [f"views.{part}.affine_probability=0" for part in ("source", "target", "probe")]  # views keep their rays

MISTAKES = [
    Mistake(
        "with training.epochs=1, and the learning rates of optimizer.schedule=cosine depend on it: restore this value",
        ["optimizer.schedule=cosine", "training.epochs=2", "output_dir={place}/cosine"],
    ),
    Mistake("unknown key training.epoch: did you mean training.epochs?", ["training.epoch=3"]),
    Mistake("seed: input should be a valid integer", ["seed=many"]),
    Mistake("diffusion.prediction: input should be 'eps', 'v' or 'x_start'", ["diffusion.prediction=score"]),
    Mistake("training.mask.latent_probability: input should be less", ["training.mask.latent_probability=2"]),
    Mistake("training.mask.section_probability needs decoder", ["training.mask.section_probability=0.1"]),
    Mistake(
        "encoder.latent_dim 2 is too small for the 3 sections of decoder.modulation=sectioned: take at least 3",
        ["decoder.modulation=sectioned", "encoder.latent_dim=2"],
    ),
    Mistake("needs decoder.modulation=sectioned", ["sampling.guidance_scale=[1, 2]"]),
    Mistake("needs decoder.modulation=sectioned", ["sampling.sections=[0]"]),
    Mistake("a list of 3, one for each section", ["decoder.modulation=sectioned", "sampling.guidance_scale=[1, 2]"]),
    Mistake("the latent's sections are 0 to 2", ["decoder.modulation=sectioned", "sampling.sections=[0, 3]"]),
    Mistake("lower diffusion.beta_end", ["diffusion.schedule=linear", "diffusion.beta_end=0.5"]),
    Mistake("is not valid YAML", ["--config", "{place}/broken.yaml"]),
    Mistake("is not valid YAML", ["--config", "{place}/object.yaml"]),
    Mistake("no config file", ["--config", "{place}/none.yaml"]),
    Mistake("no config file config/svhn.yaml: choose one of config/cars3d.yaml,", ["--config", "config/svhn.yaml"]),
    Mistake("did you mean config/cifar10_cpu_long.yaml?", ["--config", "config/cifar10_cpulong.yaml"]),
    Mistake("the following arguments are required: --config (see", []),
    Mistake("unrecognized arguments: --epochs=3 (see", ["--epochs=3"]),
    Mistake("no folder", [*folder("missing")]),
    Mistake("no images in", [*folder("empty")]),
    Mistake("data.name=posed needs data.pose", [*folder("few"), "data.name=posed"]),
    Mistake("data.split is for data.name=posed, not for digits: remove it", ["data.split=views"]),
    Mistake(
        "views.source.affine_probability moves or hides pixels, but with data.name=posed each pixel belongs to a ray: "
        f"set {' '.join(UNMOVED)}",
        [*folder("few"), "data.name=posed", "data.pose=eth80"],
    ),
    Mistake("does not fit data.pose=eth80", [*folder("few"), "data.name=posed", "data.pose=eth80", *UNMOVED]),
    Mistake("unreadable/train/b/7.png", [*folder("unreadable")]),
    Mistake("truncated/train/a/3.png", [*folder("truncated")]),
    Mistake("has no images in the classes of", [*folder("differ")]),
    Mistake("only one class", [*folder("single")]),
    Mistake("40 training images are fewer than a batch", [*folder("few")]),
    Mistake("cannot be halved 1 times", ["data.image_size=9"]),
    Mistake(
        "of the density lies between the log-SNRs of the schedule",
        ["training.timesteps.sampling=log_snr", "training.timesteps.log_snr_mean=-30", "--dry-run"],
    ),
    Mistake("a 1x1 map", ["encoder.stem=imagenet"]),
    Mistake("encoder.weights: there is no checkpoint", [*folder("missing"), "encoder.weights={place}/none.pt"]),
    Mistake(
        "good.pt holds another encoder: add encoder.latent_dim=8 to the command",
        [*folder("missing"), "encoder.weights={place}/checkpoints/good.pt", "encoder.latent_dim=16"],
    ),
    Mistake("evaluation.knn.k 1438 is more than the 1437", ["evaluation.knn.k=1438"]),
    Mistake("cannot write to output_dir", ["output_dir={place}/file/run"]),
    Mistake("busy is in use by process", ["output_dir={place}/busy"]),
    Mistake("encoder.latent_dim was 8 and is 16", ["output_dir={place}/run", "encoder.latent_dim=16"]),
    Mistake("last.pt is damaged", ["output_dir={place}/run_truncated"]),
    Mistake("last.pt cannot be read", ["output_dir={place}/run_malicious"]),
    Mistake(
        "encoder.fc.weight is (8, 31) in the checkpoint and (8, 32) in the model",
        ["output_dir={place}/run_reshaped", "training.epochs=2"],
    ),
    Mistake("File name too long", ["output_dir=" + "/x" * 3000]),
    Mistake("File name too long", ["--checkpoint", "x" * 300], "test.py"),
    Mistake("train first", [], "test.py"),
    Mistake("truncated.pt cannot be read", checkpoint("truncated"), "test.py"),
    Mistake("text.pt cannot be read", checkpoint("text"), "test.py"),
    Mistake("malicious.pt cannot be read", checkpoint("malicious"), "test.py"),
    Mistake("other.pt is not a checkpoint of this program", checkpoint("other"), "test.py"),
    Mistake("diverged.pt has weights that are not finite", checkpoint("diverged"), "test.py"),
    Mistake(
        """add decoder.modulation=shared training.mask.section_probability=0.0 sampling.sections=null""",
        [
            *checkpoint("good"),
            "decoder.modulation=sectioned",
            "training.mask.section_probability=0.1",
            "sampling.sections=[0]",
        ],
        "test.py",
    ),
    Mistake(
        "(encoder.fc.weight is (8, 32) in the checkpoint and (16, 32) in the model): add encoder.latent_dim=8",
        [*checkpoint("good"), "encoder.latent_dim=16"],
        "test.py",
    ),
    Mistake(
        "does not fit the model (encoder.fc.weight is (8, 31) in the checkpoint and (8, 32) in the model)",
        checkpoint("reshaped"),
        "test.py",
    ),
    Mistake("name a picture first: reconstruct, interpolate", ["nearer", *checkpoint("good")], "sample.py"),
    Mistake("neither a config nor a checkpoint is given", ["nearest"], "sample.py"),
    Mistake("train first", ["nearest"], "sample.py"),
    Mistake(
        "(encoder.fc.weight is (8, 32) in the checkpoint and (16, 32) in the model): add encoder.latent_dim=8",
        ["nearest", *checkpoint("good"), "encoder.latent_dim=16"],
        "sample.py",
    ),
    Mistake(
        "the test images are numbered from 0 to 359",
        ["reconstruct", *checkpoint("good"), "--images", "360"],
        "sample.py",
    ),
    Mistake("write 12 (a test image)", ["nearest", *checkpoint("good"), "--images", "cat.png"], "sample.py"),
    Mistake(
        "put key=value before the images", ["nearest", *checkpoint("good"), "--images", "0", "seed=1"], "sample.py"
    ),
    Mistake(
        "unreadable/train/b/7.png (cannot identify image file",
        ["reconstruct", *checkpoint("good"), "--images", "{place}/images/unreadable/train/b/7.png"],
        "sample.py",
    ),
    Mistake("3 images do not form pairs", ["interpolate", *checkpoint("good"), "--num_images", "3"], "sample.py"),
    Mistake(
        "no class ten: the classes are 0, 1, 2", ["directions", *checkpoint("good"), "--class", "ten"], "sample.py"
    ),
    Mistake("no class 11", ["arithmetic", *checkpoint("good"), "--terms", "class:1", "class:11", "0"], "sample.py"),
    Mistake("use at most 8, the smaller of", ["directions", *checkpoint("good"), "--num_components", "9"], "sample.py"),
    Mistake("mix needs a model with decoder.modulation=sectioned", ["mix", *checkpoint("good")], "sample.py"),
    Mistake("use sections 0 to 2 of this model", ["mix", *checkpoint("sectioned"), "--sections", "3"], "sample.py"),
    Mistake(
        "--reach nan is not valid: use a finite number above 0",
        ["directions", *checkpoint("good"), "--reach", "nan"],
        "sample.py",
    ),
    Mistake(
        "use at least 1",
        ["arithmetic", *checkpoint("good"), "--num_samples", "0", "--terms", "class:1", "class:2", "class:1"],
        "sample.py",
    ),
    Mistake(
        "use at most 1437 (latents in the fit)",
        ["generate", *checkpoint("good"), "--num_components", "1438"],
        "sample.py",
    ),
    Mistake(
        "--num_steps 1 is too small: use at least 2",
        ["interpolate", *checkpoint("good"), "--num_steps", "1"],
        "sample.py",
    ),
    Mistake(
        "use at most 1437 (all training images)",
        ["nearest", *checkpoint("good"), "--num_neighbours", "1438"],
        "sample.py",
    ),
    Mistake("one of the arguments --split --folder --files --export is required", checkpoint("good"), "embed.py"),
    Mistake("ends in neither .npz nor", [*checkpoint("good"), "--split", "test", "--out", "z.csv"], "embed.py"),
    Mistake("--out z.npz is for features", [*checkpoint("good"), "--export", "out", "--out", "z.npz"], "embed.py"),
    Mistake("output_dir does not apply to", ["nearest", *checkpoint("sectioned"), "output_dir=x"], "sample.py"),
    Mistake("--out a.jpg is not a .png file", ["nearest", *checkpoint("good"), "--out", "a.jpg"], "sample.py"),
    Mistake("--out r.html is for the report: add --report", [*checkpoint("good"), "--out", "r.html"], "test.py"),
    Mistake(
        "--protocols config is for the accuracies: add --report",
        [*checkpoint("good"), "--protocols", "config", "--measures", "uniformity"],
        "test.py",
    ),
    Mistake("holds splits, not classes", [*checkpoint("good"), "--folder", "{place}/images/few"], "embed.py"),
    Mistake("argument --folder: the path is empty: write", [*checkpoint("good"), "--folder", ""], "embed.py"),
    Mistake("no folder none", [*checkpoint("good"), "--folder", "none"], "embed.py"),
    Mistake("no images in", [*checkpoint("good"), "--folder", "{place}/images/empty"], "embed.py"),
    Mistake("the image none.png does not exist", [*checkpoint("good"), "--files", "none.png"], "embed.py"),
    Mistake("put key=value before --files", [*checkpoint("good"), "--files", "device=cpu"], "embed.py"),
    Mistake("text.pt cannot be read", [*checkpoint("text"), "--export", "out"], "embed.py"),
    Mistake("no config file", ["--config", "{place}/only_0.yaml", "--config", "{place}/only_{rank}.yaml"], processes=2),
    Mistake("the processes read different configs", ["seed={rank}"], processes=2),
    Mistake(
        "training.batch_size is 60, but for 2 processes it must be a multiple of 8: use 56 or 64",
        ["training.batch_size=60"],
        processes=2,
    ),
    Mistake(
        "micro_batch_size 16 does not divide the 24 images of each process",
        ["training.batch_size=48", "training.micro_batch_size=16"],
        processes=2,
    ),
    Mistake("the machines hold different images", [*folder("rank{rank}")], processes=2),
    Mistake(
        "the processes see different images",
        ["--folder", "{place}/images/listed{rank}", *checkpoint("good")],
        "embed.py",
        processes=2,
    ),
    Mistake(
        "the processes read different checkpoints or configs",
        ["nearest", *checkpoint("sectioned"), "sampling.num_sampling_steps={rank}1"],
        "sample.py",
        processes=2,
    ),
    Mistake("set output_dir to shared storage", ["output_dir=run"], processes=2),
    Mistake("set output_dir to shared storage", ["output_dir=new/run"], processes=2),
]


def complete(mistake: Mistake, place: Path) -> list[str]:
    """Returns all arguments of the command with the mistake. `place` holds its files."""
    config = digits_args(place / "nothing")
    if mistake.expected.startswith(("the following", "neither a config")):
        config = []
    elif checkpoint("sectioned")[1] in mistake.arguments:  # the config stored in the checkpoint is used
        config = ["device=cpu"]
    arguments = [*config, *mistake.arguments]
    if mistake.program == "sample.py":  # the name of the picture comes first
        arguments = [mistake.arguments[0], *config, *mistake.arguments[1:]]
    return [argument.replace("{place}", str(place)) for argument in arguments]


def contents(place: Path) -> dict[str, bytes | None]:
    """Returns the bytes of every file below `place`, by path; None for a folder."""
    files = (path for path in place.rglob("*") if path.name != ".lock")  # it names the last process that held it
    return {str(path.relative_to(place)): path.read_bytes() if path.is_file() else None for path in files}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with images, configs, checkpoints and runs that are wrong in some way, and a finished run in `run`."""
    place = tmp_path_factory.mktemp("mistakes") / "place"
    (place / "images" / "empty").mkdir(parents=True)
    for name in ("unreadable", "truncated"):
        write_images(place / "images" / name, train_a=40, train_b=40, test_a=2, test_b=2)
    (place / "images/unreadable/train/b/7.png").write_bytes(b"no image")
    os.truncate(place / "images/truncated/train/a/3.png", 100)
    write_images(place / "images/differ", train_a=1, train_b=1, test_c=1, test_d=1)
    write_images(place / "images/single", train_a=1, test_a=1)
    write_images(place / "images/few", train_a=20, train_b=20, test_a=1, test_b=1)
    write_images(place / "images/rank0", seed=0, flat=64)
    write_images(place / "images/rank1", seed=1, flat=64)
    for rank in (0, 1):
        write_images(place / f"images/listed{rank}", flat=4 + rank)
    (place / "broken.yaml").write_text("data: {name: digits")
    (place / "object.yaml").write_text("seed: !!python/object/apply:os.mkdir [owned]")
    (place / "only_0.yaml").write_text("data: {name: digits, image_size: 8}\n")
    (place / "file").write_text("")
    (place / "busy").mkdir()
    (place / "cosine").mkdir()
    _, path, *settings = digits_args(place / "cosine", "optimizer.schedule=cosine")
    (place / "cosine" / "config.yaml").write_text(load_config(path, settings).to_yaml())

    run = place / "run"
    assert train_program.main(digits_args(run, "sampling.num_images=0")) == 0
    checkpoints = place / "checkpoints"
    checkpoints.mkdir()
    parted = digits_args(place / "parted", "sampling.num_images=0", "decoder.modulation=sectioned")
    assert train_program.main(parted) == 0
    (place / "parted" / "checkpoints" / "last.pt").rename(checkpoints / "sectioned.pt")
    shutil.rmtree(place / "parted")
    good = (run / "checkpoints" / "last.pt").read_bytes()
    (checkpoints / "good.pt").write_bytes(good)
    (checkpoints / "truncated.pt").write_bytes(good[: len(good) // 2])
    (checkpoints / "text.pt").write_text("hello")
    (checkpoints / "malicious.pt").write_bytes(pickle.dumps(Malicious()))
    torch.save({"weights": torch.zeros(3)}, checkpoints / "other.pt")
    state = torch.load(checkpoints / "good.pt")
    state["model"]["encoder.fc.weight"] = state["model"]["encoder.fc.weight"][:, :31]
    torch.save(state, checkpoints / "reshaped.pt")
    state = torch.load(checkpoints / "good.pt")
    state["ema"]["model"]["encoder.fc.weight"][0] = torch.nan
    torch.save(state, checkpoints / "diverged.pt")
    for name in ("truncated", "malicious", "reshaped"):
        folder = shutil.copytree(run, place / f"run_{name}")
        shutil.copy(checkpoints / f"{name}.pt", folder / "checkpoints" / "last.pt")
        if name != "truncated":
            (folder / "checkpoints" / "SHA256SUMS").unlink()
    return place


def assert_refused(printed: str, expected: str) -> None:
    """Checks that the last line is the only error line, and that it contains `expected`.

    A progress bar and a list of changed keys may come before it.
    """
    lines = printed.rpartition("\r")[2].splitlines()
    assert [line for line in lines if "error" in line.lower() or "Traceback" in line] == lines[-1:], printed
    assert lines[-1].startswith("error: ") and expected in lines[-1]


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m.processes == 1], ids=lambda m: m.expected[:40])
def test_a_mistake_ends_with_one_line_and_nothing_written(
    place: Path, capsys: pytest.CaptureFixture[str], mistake: Mistake
) -> None:
    before = contents(place)
    with lock_file(place / "busy" / ".lock"), pytest.raises(SystemExit, match="2"):
        PROGRAMS[mistake.program].main(complete(mistake, place))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_refused(captured.err, mistake.expected)
    assert contents(place) == before


@pytest.mark.long
def test_two_processes_refuse_alike_and_one_says_why(place: Path, tmp_path: Path) -> None:
    before = contents(place)
    # A program checks most of its options at one place, so some of the mistakes that one process makes are enough.
    alone = [mistake for mistake in MISTAKES if mistake.processes == 1]
    mistakes = [mistake for mistake in MISTAKES if mistake.processes == 2] + alone[::3]
    shutil.copytree(place / "run", tmp_path / "disk0" / "run")  # each process has its own folder
    (tmp_path / "disk1").mkdir()
    torch.save([(mistake.program, complete(mistake, place)) for mistake in mistakes], tmp_path / "cases.pt")
    with lock_file(place / "busy" / ".lock"):
        launch_two("-m", "tests.processes", "mistakes", str(tmp_path))
    found: list[list[tuple[Any, str]]] = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for mistake, (first, said), (second, also_said) in zip(mistakes, *found, strict=True):
        assert (first, second) == (2, 2), mistake
        assert_refused(said, mistake.expected)
        lines = also_said.rpartition("\r")[2].splitlines()
        # On a busy machine, a process also says that it waits for the other one.
        assert [line for line in lines if not line.startswith("waiting: rank")] == [], mistake
    assert contents(place) == before


@pytest.mark.long
def test_a_launcher_shows_the_line_once_and_status_2_of_each_process(place: Path) -> None:
    done = launch(*TWO_PROCESSES, "train.py", *digits_args(place / "nothing"), "training.epoch=3")
    assert done.returncode == 1, "torchrun itself exits with status 1"
    assert [line for line in done.stderr.splitlines() if "error: " in line and "error_file" not in line] == [
        "error: the command line (training.epoch=3): unknown key training.epoch: did you mean training.epochs?"
    ]
    assert done.stderr.count("exitcode  : 2 ") == 2, done.stderr


def test_a_run_that_another_has_overtaken_does_not_start(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run does not start if another run has trained in its folder while this one was loading images."""
    from experiment import opening

    def slowly(*args: Any) -> Any:
        shutil.copytree(place / "run", tmp_path / "run")
        return build_dataset(*args)

    build_dataset = opening.build_dataset
    monkeypatch.setattr(opening, "build_dataset", slowly)
    with pytest.raises(SystemExit, match="2"):
        train_program.main(digits_args(tmp_path / "run", "training.epochs=2"))
    assert_refused(capsys.readouterr().err, "another run has just used")
    assert contents(tmp_path / "run") == contents(place / "run")
