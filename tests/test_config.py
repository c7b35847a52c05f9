"""Tests of the config: files, overrides, error messages and comparison."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from config.errors import ConfigError
from config.finetune_schema import FinetuneConfig
from config.keys import all_keys, describe_keys, differences
from config.reading import load, load_config, override, parse, parse_config
from config.schema import Config, View
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "config").glob("*.yaml"))


def load_any(path: Path) -> Any:
    """Returns a config of train.py or of finetune.py."""
    return load(FinetuneConfig if "method" in yaml.safe_load(path.read_text()) else Config, path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_survives_being_written(path: Path) -> None:
    config = load_any(path)
    assert Path(config.output_dir) == Path("runs") / path.stem / config.run_name
    assert parse(type(config), config.to_yaml(), "text") == config


def test_a_config_saved_before_a_key_was_added_has_its_default() -> None:
    config = load_config(ROOT / "config" / "digits.yaml", ["training.mask.latent_probability=0.2"])
    saved = yaml.safe_load(config.to_yaml())
    del saved["initialization"], saved["decoder"]["modulation"], saved["sampling"]["sections"]
    saved["sampling"]["guidance_scale"] = 1.3
    assert parse_config(yaml.safe_dump(saved), "a checkpoint") == config


def test_every_config_says_only_what_differs_from_the_defaults() -> None:
    for path in CONFIGS:
        config, text = load_any(path), yaml.safe_load(path.read_text())
        for name, field, _ in all_keys(type(config)):
            node = text
            for part in name.split("."):
                node = node.get(part) if isinstance(node, dict) else None
            if node is not None and not name.startswith("data.") and name != config.marker:
                assert node != field.default, f"{path.name}: {name} repeats its default"
        assert config.data.name


def test_the_recipe_of_the_reference() -> None:
    cifar, tiny = load_config(ROOT / "config/cifar10.yaml"), load_config(ROOT / "config/tiny.yaml")
    for config in (cifar, tiny):
        assert (config.training.epochs, config.training.batch_size) == (800, 512)
        assert (config.optimizer.decoder_lr, config.optimizer.encoder_lr) == (4e-4, 8e-4)
        assert config.optimizer.betas == [0.9, 0.95] and config.optimizer.weight_decay == 0.05
        assert config.views.source.noise_std == 0.10
        assert config.evaluation.every == 100
    assert (cifar.encoder.stem, tiny.encoder.stem) == ("small", "imagenet")


def test_the_recipe_of_diffusion_based_representation_learning() -> None:
    config = load_config(ROOT / "config/drl_cifar10.yaml")
    steps_per_epoch, optimizer, training = 50_000 // 64, config.optimizer, config.training
    assert (config.encoder.architecture, config.encoder.latent_dim) == ("wide_resnet28_2", 128)
    assert 70_000 <= training.epochs * steps_per_epoch < 71_000 and training.batch_size == 64
    assert round(optimizer.warmup_epochs * steps_per_epoch) == 5000 and optimizer.max_grad_norm == 1
    assert (optimizer.encoder_lr, optimizer.decoder_lr, optimizer.weight_decay) == (2e-4, 2e-4, 0)
    assert training.ema_decay == 0.999 and training.terms.kl == 1e-5
    for name in ("cifar10", "digits"):
        config = load_config(ROOT / f"config/drl_{name}.yaml")
        assert config.views.same and config.views.source.noise_std == 0 and config.diffusion.schedule == "geometric"
        assert config.encoder.time_dependent and config.encoder.probabilistic


def test_overrides_replace_single_keys_and_numbers_need_no_dot(write) -> None:  # type: ignore[no-untyped-def]
    path = write("optimizer: {encoder_lr: 1e-4, weight_decay: 1E-2}\n")
    config = load_config(path, ["training.epochs=2", "views.target.crop_scale=[0.5, 1]", "optimizer.decoder_lr=2e-05"])
    assert (config.optimizer.encoder_lr, config.optimizer.weight_decay) == (1e-4, 1e-2)
    assert (config.training.epochs, config.optimizer.decoder_lr) == (2, 2e-5)
    assert config.views.target.crop_scale == [0.5, 1] and config.views.source.crop_scale == [0.08, 1.0]
    assert load_config(write("")) == load_config(path, ["optimizer.encoder_lr=8e-4", "optimizer.weight_decay=0.05"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.epoch=2", "unknown key training.epoch: did you mean training.epochs?"),
        ("batch_size=64", "did you mean training.batch_size?"),
        ("encoder.wdith=64", "did you mean encoder.width?"),
        ("zzz=1", "unknown key zzz"),
        ("trainnig.epochs=2", "did you mean training?"),
        ("training=3", "training is a section, not a value: set its keys, as in training.epochs=800"),
        ("decoder=5", "decoder is a section, not a value: set its keys, as in decoder.model_channels=128"),
        ("training.checkpoint_every=100", "write `N steps`, `N epochs` or `N minutes`, not '100'"),
        ("seed=0x_", "seed: input should be a valid integer, not '0x_'"),
        ("optimizer.warmup_epochs=1e308", "optimizer.warmup_epochs"),
        ("training.epochs=many", "training.epochs: input should be a valid integer, not 'many'"),
        ("training.epochs=2.5", "training.epochs"),
        ("training.epochs=0", "training.epochs: input should be greater than or equal to 1"),
        ("training.batch_size=510", "multiple of 4"),
        ("training.use_amp=maybe", "training.use_amp"),
        ("optimizer.encoder_lr=-1", "optimizer.encoder_lr"),
        ("optimizer.encoder_lr=.nan", "optimizer.encoder_lr"),
        ("decoder.dropout=1.5", "decoder.dropout"),
        ("views.source.crop_scale=[0.5, 2]", "fraction of the area"),
        ("views.source.crop_scale=[0.5, 0.2]", "low <= high"),
        ("views.source.crop_scale=[1]", "views.source.crop_scale"),
        ("training.checkpoint_every=10min", "training.checkpoint_every"),
        ("data.image_size=30", "cannot be halved 3 times"),
        (
            "decoder.image_size=24",
            "decoder.image_size 24 does not divide data.image_size 32: set data.image_size to a multiple of 24, or "
            "decoder.image_size to one of [8, 16, 32]",
        ),
        ("decoder.image_size=64", "decoder.image_size 64 does not divide data.image_size 32"),
        (
            "decoder.image_size=8 data.image_size=30",
            "does not divide data.image_size 30: set data.image_size to a multi",
        ),
        (
            "decoder.image_size=4",
            "decoder.image_size 4 cannot be halved 3 times, as decoder.channel_mult requires: take one of [8, 16, 32]",
        ),
        ("decoder.image_size=2", "decoder.image_size: input should be greater than or equal to 4"),
        (
            "decoder.image_size=8",
            "decoder.attn_resolutions: 16 is none of the decoder's sizes: choose from [8, 4, 2, 1]",
        ),
        ("decoder.attn_resolutions=[15]", "none of the decoder's sizes: choose from [32, 16, 8, 4]"),
        ("decoder.num_head_channels=48", "decoder.num_head_channels"),
        ("encoder.stem=imagenet data.image_size=16", "encoder.stem"),
        (
            "data.stored_size=24",
            "data.stored_size 24 is smaller than data.image_size 32: set it to at least 32, or remove it",
        ),
        (
            "encoder={architecture: wide_resnet28_2, stem: imagenet}",
            "encoder.stem=imagenet is for torchvision's ResNets, not for wide_resnet28_2: set encoder.stem=small",
        ),
        ("encoder={architecture: wide_resnet28_2, width: 32}", "not for wide_resnet28_2: set encoder.width=64"),
        ("training.terms.kl=1e-5", "training.terms.kl needs encoder.probabilistic=true: set both, or neither"),
        ("views={same: true, num_sources: 2}", "views.same needs views.num_sources=1: set both, or neither"),
        (
            "views={same: true, target: {randaugment_num_ops: 3}}",
            "views.source.randaugment_num_ops is 2 and views.target.randaugment_num_ops is 3: set them to one value",
        ),
        ("evaluation.timesteps=[5]", "evaluation.timesteps needs encoder.time_dependent=true: set both, or neither"),
        ("evaluation.timesteps=[3, 1000]", "names timestep 1000: timesteps go from 0 to 999"),
        ("training.micro_batch_size=100", "training.micro_batch_size must divide"),
        ("sampling.num_sampling_steps=2000", "sampling.num_sampling_steps"),
        ("data.pose={height}-{yaw}", "data.pose: {height}-{yaw} has the unknown field {height}: write a pattern"),
        ("data.pose={polar}", "{polar} does not have one azimuth and at most one height"),
        ("data.pose={polar}-{yaw", "{polar}-{yaw is not a pattern"),
        ("data.pose={azimuth}{polar}", "{azimuth}{polar} has two angles without a separator"),
        ("data.pose=cars3d", "data.pose is for data.name=posed, not for cifar10: remove it"),
        ("data.stream=true", "data.stream is for data sets of image files, tiny, folder and posed, not for cifar10"),
        ("evaluation.features=q", "evaluation.features"),
        ("evaluation.features=decoder.middle.2@5", "the decoder has middle.0 to middle.1"),
        ("evaluation.features=decoder.up.15@5", "the decoder has up.0 to up.14"),
        ("evaluation.features=decoder.down.10@1000", "timesteps go from 0 to 999"),
        (
            "diffusion={sigma_min: 5, sigma_max: 5}",
            "sigma_max must be larger than diffusion.sigma_min",
        ),
        ("diffusion.sigma_min=0", "diffusion.sigma_min: input should be greater than or equal to 0.0001"),
        ("diffusion.sigma_max=1e5", "diffusion.sigma_max: input should be less than or equal to 10000"),
        ("views.source.color_jitter=[1, 1, 1, 0.6]", "hue is at most 0.5"),
        ("views.target.blur_sigma=[0, 2]", "0 < low <= high"),
        ("optimizer={schedule: cosine, cooldown_epochs: 1}", "cooldown_epochs needs optimizer.schedule=constant"),
        ("optimizer.cooldown_epochs=790", "add up to 810 epochs, more than the 800 of training.epochs"),
        ("encoder=3", "encoder is a section"),
        (f"output_dir=runs/{'x' * 256}", "at most 255 bytes"),
        ("encoder.width.x=3", "encoder.width"),
        ("training.epochs", "overrides are written key=value"),
        ("training.epochs=[1", "not valid YAML"),
        ("seed=!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_mistakes_are_explained_in_one_line(write, override: str, expected: str) -> None:  # type: ignore[no-untyped-def]
    overrides = override.split() if " data." in override else [override]
    with pytest.raises(ConfigError) as caught:
        load_config(write("seed: 0\n"), overrides)
    assert expected in str(caught.value)
    assert f"the command line ({overrides[0]})" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_error_is_said_to_be_where_it_is(write) -> None:  # type: ignore[no-untyped-def]
    """An error is in the file, in an override, or in both if keys of both contradict each other."""
    path = write("seed: x\ndevice: gpu\noptimizer: {beta_end: 3}\ntraining: {batch_size: 64}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["seed=y", "training.epochs=0", "seed=z", "views={target: {blur: 1}}"])
    line = str(caught.value)
    assert line.startswith("the command line (seed=z): seed: input should be a valid integer, not 'z'; ")
    assert f"; {path}: device: input should be 'auto', " in line and "; unknown key optimizer.beta_end: did you" in line
    assert "; the command line (training.epochs=0): training.epochs: input should be greater" in line
    assert "; the command line (views={target: {blur: 1}}): unknown key views.target.blur: did you mean" in line
    with pytest.raises(ConfigError) as caught:
        override(load_config(write("")), ["training.micro_batch_size=12", "seed=1"], "a checkpoint")
    assert str(caught.value).startswith("a checkpoint and the command line (training.micro_batch_size=12): training.")
    with pytest.raises(ConfigError, match=r"^the command line \(seed=1\\n2\): seed: input should"):
        load_config(path, ["seed=1\n2"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training: {epochs: 2", "not valid YAML"),
        ("- a\n- b\n", "key: value"),
        ("training:\n  epochs: 2\n  epochs: 3\n", "'epochs' is given twice"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("training: {epochs: 0, batch_size: x}", "training.epochs"),
        ('output_dir: "a\\0b"', "output_dir"),
        ("on: 3", "unknown key on: "),
        ("training: {No: 3}", "unknown key training.No: "),
        ("data: {010: 3}", "unknown key data.010: "),
        ("on: 3\non: 4", "line 1: key 'on' is given twice"),
        ("? [seed]\n: 3", "unhashable"),
    ],
)
def test_bad_files_are_explained(write, text: str, expected: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert expected in str(caught.value) and "experiment.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_config_names_those_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"config/cifar10\.yaml"):
        load_config("config/cifar11.yaml")


def test_every_key_is_documented_once() -> None:
    for schema in (Config, FinetuneConfig):
        text = describe_keys(schema)
        assert schema.program in text
        for name, field, _ in all_keys(schema):
            assert field.description and text.count(f"  {name}=") == 1


def test_differences_by_kind() -> None:
    old = Config()
    new = old.model_copy(
        update={"device": "cpu", "training": old.training.model_copy(update={"epochs": 900, "log_every": 7})}
    )
    assert differences(old, new, run=False) == {"training.epochs": (800, 900)}
    assert differences(old, new, run=True) == {"device": ("auto", "cpu"), "training.log_every": (50, 7)}
    assert differences(old, new, run=False, prefixes=("data.",)) == {}


def test_yaml_merges_and_home_folders(write, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HOME", "/home/someone")
    path = write("views:\n  source: &v {crop_scale: [0.5, 1]}\n  target: {<<: *v, flip_probability: 0.0}\n")
    config = load_config(path, ["data.root=~/photos"])
    assert config.views.target.crop_scale == [0.5, 1] and config.views.target.flip_probability == 0
    assert config.data.root == "/home/someone/photos"


def test_an_empty_section_is_its_defaults(write) -> None:  # type: ignore[no-untyped-def]
    path = write("training:\nviews: {source: }\n")
    assert load_config(path) == load_config(write(""))
    config = load_config(path, ["training.epochs=2", "views.source.noise_std=0"])
    assert config.training.epochs == 2 and config.views.source.noise_std == 0


def test_what_an_alias_shares_is_overridden_apart(write) -> None:  # type: ignore[no-untyped-def]
    """An override of a section that is shared through a YAML alias changes only this section.

    An alias that refers to itself is refused.
    """
    path = write("views: {source: &v {crop_scale: [0.5, 1]}, target: *v}\n")
    config = load_config(path, ["views.source.crop_scale=[0.2, 1]", "views.source.noise_std=0.3"])
    assert config.views.source.crop_scale == [0.2, 1] and config.views.target.crop_scale == [0.5, 1]
    with pytest.raises(ConfigError, match="refers to itself"):
        load_config(write("views: &v {source: *v}\n"))


def test_keys_of_the_evaluation_may_change_on_resume(write) -> None:  # type: ignore[no-untyped-def]
    path = write("")
    changed = load_config(path, ["views.probe.crop_scale=[0.5, 1]", "evaluation.knn.k=5"])
    assert not differences(load_config(path), changed, run=False)
    assert set(differences(load_config(path), changed, run=True)) == {"views.probe.crop_scale", "evaluation.knn.k"}


def test_views_that_differ_in_a_key_have_different_names() -> None:
    """Views that differ in any key have different names, because tables of accuracies name protocols by their views."""
    used: Any = {name: 0.5 for name in View.model_fields if name.endswith("_probability")}
    base = View(**used)
    for name in View.model_fields:
        value = getattr(base, name)
        other = [part * 0.9 for part in value] if isinstance(value, list) else value + 1 if value != 0.5 else 0.25
        assert str(base.model_copy(update={name: other})) != str(base), name
