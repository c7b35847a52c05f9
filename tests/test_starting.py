"""Tests of runs that start from given weights, and of a frozen encoder."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

import train as train_program
from config.errors import ConfigError
from config.reading import load_config
from experiment.starting import check_origin, read_starting_weights, weight_paths
from experiment.trained import read_trained, reduced_checkpoint
from model.resnets import ResNetEncoder
from tests.conftest import (
    ROOT,
    TINY_MODEL,
    assert_equal_states,
    digits_args,
    experiment_of,
    last,
    write_images,
)
from training.saving import checkpoint_contents
from training.state import TrainState, initial_state
from training.step import train_step, training_pixels
from utils.logging import PhaseTimer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """Checkpoint of a tiny model that was trained for two steps, and its state."""
    folder = tmp_path_factory.mktemp("saved")
    experiment = experiment_of(folder, "seed=5")
    state, pixels = initial_state(experiment), training_pixels(experiment, 0)
    for _ in range(2):
        train_step(experiment, state, pixels, PhaseTimer())
    path = folder / "start.pt"
    torch.save(checkpoint_contents(experiment, state), path)
    return path, state


def config_of(*overrides: str) -> Any:
    """Returns the config of a tiny model on digits."""
    return load_config(ROOT / "config" / "digits.yaml", [*TINY_MODEL, "data.image_size=8", *overrides])


@pytest.mark.parametrize("frozen", [False, True])
def test_both_parts_start_from_a_checkpoint_and_a_frozen_encoder_stays(
    saved: tuple[Path, TrainState], tmp_path: Path, caplog: pytest.LogCaptureFixture, frozen: bool
) -> None:
    """The weights are those of the EMA model. Training changes both parts, but nothing in a frozen encoder."""
    path, before = saved
    caplog.set_level(logging.INFO)
    named = [f"encoder.weights={path}", f"decoder.weights={path}"]
    experiment = experiment_of(tmp_path, *named, f"encoder.frozen={frozen}", "optimizer.weight_decay=0.5")
    state, expected = initial_state(experiment), before.ema.ema_model.state_dict()
    assert not torch.equal(before.soda.encoder.fc.weight, before.ema.ema_model.encoder.fc.weight)
    for model in (state.soda, state.ema.ema_model):
        assert_equal_states(model.state_dict(), expected)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert state.state_dict()["started_from"] == {"encoder": digest, "decoder": digest}
    assert f"the encoder starts from {path}, the EMA encoder of step 2: " in caplog.text

    pixels = training_pixels(experiment, 0)
    for _ in range(3):
        train_step(experiment, state, pixels, PhaseTimer())
    for model in (state.soda, state.ema.ema_model):
        found = model.state_dict()
        changed = {name.split(".")[0] for name in found if not torch.equal(found[name], expected[name])}
        assert changed == ({"decoder"} if frozen else {"encoder", "decoder"})
    assert [len(group["params"]) > 0 for group in state.optimizer.param_groups] == [not frozen, True]
    assert state.soda.decoder.training and state.soda.encoder.bn1.training != frozen


def test_a_frozen_encoder_gets_images_as_it_was_trained_with(saved: tuple[Path, TrainState], tmp_path: Path) -> None:
    """Its normalisation is that of the file, also after resuming. A trained encoder has that of its own images."""
    root, found = write_images(tmp_path / "images", train_a=40, train_b=40, test_a=20, test_b=20), []
    for run, *overrides in (("frozen", "encoder.frozen=true"), ("frozen", "training.epochs=2"), ("trained",)):
        args = ["data.name=folder", f"data.root={root}", f"data.cache_dir={tmp_path}", f"encoder.weights={saved[0]}"]
        args += ["encoder.frozen=true", *overrides] if run == "frozen" else overrides
        assert train_program.main(digits_args(tmp_path / run, *args)) == 0
        found.append(last(tmp_path / run)["statistics"])
    theirs = torch.load(saved[0])["statistics"]
    assert found[:2] == [theirs] * 2 and found[2] != theirs


def test_a_run_starts_from_a_reduced_checkpoint(saved: tuple[Path, TrainState], tmp_path: Path) -> None:
    """A checkpoint with the EMA model alone gives the same weights. Its parameters are rounded to bf16."""
    torch.save(reduced_checkpoint(read_trained(None, saved[0], ["device=cpu"])), tmp_path / "model.pt")
    named = [f"{part}.weights={tmp_path / 'model.pt'}" for part in ("encoder", "decoder")]
    state = initial_state(experiment_of(tmp_path, *named))
    parameters = {name for name, _ in state.soda.named_parameters()}
    for name, expected in saved[1].ema.ema_model.state_dict().items():
        rounded = expected.bfloat16().float() if name in parameters else expected
        assert torch.equal(state.soda.state_dict()[name], rounded), name


@pytest.mark.parametrize("counters", [True, False])
def test_an_encoder_starts_from_torchvisions_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, counters: bool
) -> None:
    """The pooled features are torchvision's. The last layer is new, unless its shape is that of the file.

    Files of torch before 0.4.1 have no counters of BatchNorm. torch loads them, too.
    """
    caplog.set_level(logging.INFO)
    theirs = torchvision.models.resnet18(weights=None, num_classes=20).eval()
    kept = {name: each for name, each in theirs.state_dict().items() if counters or not name.endswith("_tracked")}
    torch.save(kept, tmp_path / "theirs.pth")
    settings = [f"encoder.weights={tmp_path / 'theirs.pth'}", "encoder.stem=imagenet", "encoder.width=64"]
    settings += ["data.image_size=64", "decoder.attn_resolutions=[]"]
    images = torch.randn(2, 3, 64, 64)
    for latent_dim, new in ((8, ["fc.weight", "fc.bias"]), (20, [])):
        config = config_of(*settings, f"encoder.latent_dim={latent_dim}")
        found = read_starting_weights(config)["encoder"]
        ours = ResNetEncoder(architecture="resnet18", stem="imagenet", width=64, latent_dim=latent_dim).eval()
        found.load_into(ours)
        assert found.new == new and len(found.weights) == len(theirs.state_dict()) - len(new)
        with torch.no_grad():
            torch.testing.assert_close(theirs.fc(ours.pooled(images)), theirs(images))
    with pytest.raises(ConfigError, match=r"needs all weights, but .*theirs.pth has no fc.weight of the model's shape"):
        read_starting_weights(config_of(*settings, "encoder.frozen=true"))
    read_starting_weights(config_of("encoder.frozen=true"))
    assert "the encoder keeps its random initial weights" in caplog.text


def test_weights_that_do_not_fit_are_refused(saved: tuple[Path, TrainState], tmp_path: Path) -> None:
    path, state = saved
    encoder = state.soda.encoder.state_dict()
    files = {
        "encoder": encoder,
        "incomplete": {name: value for name, value in encoder.items() if name != "layer2.0.bn1.bias"},
        "more": encoder | {"layer5.weight": torch.zeros(1)},
        "list": [torch.zeros(1)],
        "nan": {
            name: torch.full_like(each, torch.nan) if name == "fc.bias" else each for name, each in encoder.items()
        },
        "wrapped": {"epoch": 3, "optimizer": {"state": {}}, "state_dict": encoder},
        "single": {"weight": torch.zeros(1)},
        "prefixed": {f"module.{name}": each for name, each in encoder.items()},
    }
    for name, contents in files.items():
        torch.save(contents, tmp_path / f"{name}.pt")
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    for arguments, expected in [
        ("encoder.weights=none.pt", r"^encoder.weights: there is no checkpoint .*none.pt"),
        ("encoder.weights=text.pt", "text.pt cannot be read"),
        ("encoder.weights=text.safetensors", "text.safetensors cannot be read"),
        ("encoder.weights=list.pt", "list.pt is not a checkpoint of this program or a state dict: use another file"),
        ("encoder.weights=incomplete.pt", "the file has no layer2.0.bn1.bias"),
        ("encoder.weights=nan.pt", "nan.pt has values in fc.bias that are not finite: use another file"),
        ("encoder.weights=wrapped.pt", "its entry 'state_dict' is a state dict: save this entry to a file of its own"),
        ("encoder.weights=single.pt", "set the keys of `encoder` to the architecture of the file, or use another file"),
        ("encoder.weights=prefixed.pt", r"all its names begin with 'module\.': save it without this prefix, or use"),
        ("encoder.weights=more.pt", "the model has no layer5.weight"),
        (
            "encoder.weights=encoder.pt encoder.width=8",
            r"\(conv1.weight is \(4, 3, 3, 3\) in the file and \(8, 3, 3, 3\) in the model\): set the keys of "
            r"`encoder` to the architecture of the file \(encoder.width=4 encoder.stem=small\), or use another file",
        ),
        ("encoder.weights=encoder.pt encoder.architecture=resnet34", "the file has no layer1.2.conv1.weight"),
        ("decoder.weights=encoder.pt", "encoder.pt is not a checkpoint of this program: use another file"),
        ("encoder.weights=start.pt encoder.latent_dim=16", "another encoder: add encoder.latent_dim=8 to the command"),
        ("decoder.weights=start.pt decoder.scale_offset=0", "another decoder: add decoder.scale_offset=1.0 to"),
        ("decoder.weights=start.pt initialization=paper", "add initialization=default to the command"),
        ("decoder.weights=start.pt diffusion.prediction=v", "add diffusion.prediction=eps to the command"),
        ("decoder.weights=start.pt encoder.latent_dim=20", "another decoder: add encoder.latent_dim=8 to the command"),
    ]:
        folder = path.parent if "start.pt" in arguments else tmp_path
        with pytest.raises(ConfigError, match=expected) as caught:
            read_starting_weights(config_of(*arguments.replace("weights=", f"weights={folder}/").split()))
        assert "\n" not in str(caught.value)


def test_a_run_resumes_without_the_file_but_not_with_another(
    saved: tuple[Path, TrainState], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    files, digest = (tmp_path / "a.pt", tmp_path / "b.pt"), hashlib.sha256(saved[0].read_bytes()).hexdigest()
    for file in files:
        file.write_bytes(saved[0].read_bytes())
    few = ("sampling.num_images=0", "encoder.frozen=true")
    command = digits_args(tmp_path / "run", *few, f"encoder.weights={files[0]}", f"decoder.weights={files[1]}")
    assert train_program.main(command) == 0
    kept = torch.load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert kept["started_from"] == {"encoder": digest, "decoder": digest}

    for part, file in zip(("encoder", "decoder"), files, strict=True):
        torch.save(saved[1].soda.encoder.state_dict(), file)
        with pytest.raises(SystemExit, match="2"):
            train_program.main([*command, "training.epochs=2"])
        assert f"{part}.weights={file} is not the file that this run started from" in capsys.readouterr().err
        file.unlink()
    assert train_program.main([*command, "training.epochs=2"]) == 0
    for part, file in zip(("encoder", "decoder"), files, strict=True):
        assert f"{part}.weights={file} is missing, but is not needed on resume" in caplog.text
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert last["step"] == 44 and last["started_from"] == kept["started_from"]
    assert torch.equal(last["model"]["encoder.fc.weight"], kept["model"]["encoder.fc.weight"])
    with pytest.raises(ConfigError, match=f"this run started from encoder.weights, a file with .* {digest[:16]}"):
        check_origin(weight_paths(config_of()), {"encoder": digest})
    with pytest.raises(
        ConfigError, match=r"this run did not start from encoder.weights, which has no effect on resume"
    ):
        check_origin(weight_paths(config_of(f"encoder.weights={saved[0]}")), {})
