"""Tests of encoders that depend on the timestep: the model, training, sampling, and what needs a single z."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import embed as embed_program
import sample as sample_program
import test as judge_program
import train as train_program
from analysis.image_encoder import load_encoder
from config.errors import ConfigError
from config.reading import load_config
from config.schema import Diffusion
from evaluation.codec import Codec
from evaluation.encoders import encode_with
from experiment.starting import read_starting_weights
from experiment.trained import check_timestep, open_trained, read_trained
from model.build import ENCODERS, build_soda
from model.diffusion import log_sigmas
from model.encoder import TimeBiases
from model.guidance import guided_denoiser
from model.soda import SODA
from tests.conftest import ROOT, assert_equal_states, batch_of, digits_args, experiment_of, small_soda
from training.sample_grid import sample_grid
from training.state import initial_state

MODEL = ["encoder.time_dependent=true", "diffusion.schedule=geometric", "diffusion.num_timesteps=100"]
SAME = ["views.same=true", "views.source.noise_std=0"]


def time_dependent_soda(**encoder: Any) -> SODA:
    """Returns a small SODA with a time-dependent encoder, for 100 timesteps of the geometric schedule."""
    torch.manual_seed(0)
    settings = {"architecture": "resnet18", "stem": "small", "width": 4, "latent_dim": 8, "time_dependent": True}
    sizes = {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": []}
    decoder = {**sizes, "num_head_channels": None, "dropout": 0.0}
    diffusion = Diffusion(schedule="geometric", num_timesteps=100).model_dump()
    soda = build_soda(8, settings | encoder, decoder, diffusion=diffusion)
    soda.decoder.load_state_dict(small_soda(attn_resolutions=[]).decoder.state_dict())
    return soda.eval()


def test_biases_are_an_mlp_of_fourier_features_of_the_noise_level() -> None:
    settings = Diffusion(schedule="geometric", num_timesteps=100)
    u = (np.arange(100) + 0.5) / 100
    expected = np.log(0.02) + u * np.log(100 / 0.02)
    found = log_sigmas(**settings.model_dump())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    linear = log_sigmas(**Diffusion().model_dump())
    betas = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(linear[0].item(), np.log(betas[0] / (1 - betas[0])) / 2)

    torch.manual_seed(0)
    biases: Any = TimeBiases(found, [3, 5])
    assert 14 < biases.frequencies.std() < 18
    phases = 2 * np.pi * expected[[7, 93]][:, None] * biases.frequencies.double().numpy()
    h = torch.from_numpy(np.concatenate([np.sin(phases), np.cos(phases)], axis=1)).float()
    for layer in (biases.mlp[0], biases.mlp[2]):
        h = torch.nn.functional.silu(h @ layer.weight.T + layer.bias)
    for bias, layer in zip(biases(torch.tensor([7, 93])), biases.biases, strict=True):
        torch.testing.assert_close(bias[:, :, 0, 0], h @ layer.weight.T + layer.bias, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "wide_resnet28_1"])
def test_an_encoder_at_a_timestep(architecture: Any) -> None:
    """Without its biases it is the ordinary encoder. A bias enters at the input of its block."""
    settings = {"architecture": architecture, "stem": "small", "width": 64, "latent_dim": 8}
    if not architecture.startswith("wide"):
        settings["width"] = 4
    torch.manual_seed(0)
    encoder: Any = ENCODERS[architecture](
        **settings, log_sigmas=log_sigmas(**Diffusion().model_dump()), probabilistic=True
    ).eval()
    x, timesteps = torch.randn(3, 3, 8, 8), torch.tensor([0, 400, 999])
    with pytest.raises(ValueError, match="needs timesteps"):
        encoder(x)
    whole = encoder.features(x, timesteps)
    for i, timestep in enumerate(timesteps.tolist()):
        of_one, own = encoder.at(timestep), x[i : i + 1]
        assert not of_one.is_time_dependent and of_one.latent_dim == 8
        for name, values in of_one.features(x).items():
            torch.testing.assert_close(values[i], whole[name][i])
        mean, log_variance = of_one.from_pooled(of_one.pooled(own))
        torch.testing.assert_close(mean, encoder(own, timesteps[i : i + 1]))
        assert log_variance is not None and log_variance.shape == (1, 8)
    assert not torch.allclose(encoder.at(0)(x), encoder.at(999)(x))

    plain: Any = ENCODERS[architecture](**settings, probabilistic=True).eval()
    weights = encoder.state_dict()
    plain.load_state_dict({name: value for name, value in weights.items() if not name.startswith("time.")})
    for layer in encoder.time.biases:
        layer.weight.zero_()
        layer.bias.zero_()
    assert torch.equal(encoder(x, timesteps), plain(x)) and torch.equal(plain(x, timesteps), plain(x))
    encoder.time.biases[2].bias.fill_(0.5)
    blocks = [block for name, group in plain.named_children() if re.match(r"layer\d", name) for block in group]
    assert len(blocks) == len(encoder.time.biases)
    blocks[2].register_forward_pre_hook(lambda _, inputs: (inputs[0] + 0.5,))
    torch.testing.assert_close(encoder(x, timesteps), plain(x))


@torch.no_grad()
def test_training_and_sampling_encode_at_the_timestep_of_the_decoder() -> None:
    soda = time_dependent_soda()
    x_source, x_t, timesteps = torch.randn(4, 2, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([3, 50, 51, 99])
    first, second = (soda.encoder(view, timesteps) for view in x_source.unbind(dim=1))
    z = (first + second) / 2
    denoised = soda(x_source, x_t, timesteps, torch.zeros(4, 1, dtype=torch.bool))
    torch.testing.assert_close(denoised.prediction, soda.decoder(x_t, timesteps, z))
    torch.testing.assert_close(soda.encode(x_source, timesteps), z)
    condition = soda.condition(x_source)
    assert callable(condition)
    for scale in (1.0, 2.5):
        expected = guided_denoiser(soda.decoder, z, scale)(x_t, timesteps)
        torch.testing.assert_close(guided_denoiser(soda.decoder, condition, scale)(x_t, timesteps), expected)
    assert isinstance(small_soda().condition(x_source), Tensor)


def test_one_view_in_two_sizes_has_no_shift_and_no_blur() -> None:
    """With data.stored_size, source and target are cut in their own sizes, and shift and blur are in their pixels."""
    sizes = ["data.name=folder", "data.stored_size=64", "decoder.image_size=16"]
    for key in ("shift_pixels=4", "blur_probability=0.5"):
        views = ["views.same=true", f"views.source.{key}", f"views.target.{key}"]
        load_config(ROOT / "config/cifar10.yaml", ["data.name=folder", "decoder.image_size=16", *views])
        with pytest.raises(ConfigError, match=rf"views.same contradicts views.target.{key.partition('=')[0]}, because"):
            load_config(ROOT / "config/cifar10.yaml", [*sizes, *views])


def test_source_and_target_are_one_view(tmp_path: Path) -> None:
    """The target is the source without its noise, also in the grid, and also if the decoder's images are smaller."""
    for size in (8, 4):
        small = (f"decoder.image_size={size}", "decoder.attn_resolutions=[]")
        experiment = experiment_of(tmp_path, "views.same=true", "views.source.noise_std=0", *small)
        batch = batch_of(experiment, 3, range(8, 40))
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (experiment.info.mean, experiment.info.std))
        expected = F.adaptive_avg_pool2d((batch.x_source[:, 0] * std + mean) * 2 - 1, size)
        torch.testing.assert_close(batch.x_start, expected, rtol=1e-4, atol=1e-4)
        assert batch_of(experiment, 4, range(8, 40)).x_start.ne(batch.x_start).any(), "views are still drawn"
        noise = ("views.source.noise_std=0.2", *small)
        noisy = batch_of(experiment_of(tmp_path, "views.same=true", *noise), 3, range(8, 40))
        assert torch.equal(noisy.x_start, batch.x_start)
        assert (noisy.x_source - batch.x_source).std().item() == pytest.approx(0.2, rel=0.05)
        two_views = batch_of(experiment_of(tmp_path, *noise), 3, range(8, 40))
        assert torch.equal(two_views.x_source, noisy.x_source) and not torch.equal(two_views.x_start, noisy.x_start)
        if size == 8:
            enlarged = sample_grid(experiment, initial_state(experiment).soda).float()
            rows = [enlarged[:, top : top + 64] for top in (2, 134)]
            torch.testing.assert_close(*rows, rtol=0, atol=1.0)


def test_compilation_and_mixed_precision_change_only_rounding() -> None:
    """A compiled model is one graph with the same outputs. In bf16, the biases of neighbouring timesteps stay apart."""
    soda = time_dependent_soda()
    x_source, x_t = torch.randn(6, 1, 3, 8, 8), torch.randn(6, 3, 8, 8)
    timesteps, kept = torch.tensor([0, 1, 40, 41, 98, 99]), torch.zeros(6, 1, dtype=torch.bool)
    with torch.no_grad():
        expected = soda(x_source, x_t, timesteps, kept)
        compiled = copy.deepcopy(soda)
        compiled.compile(backend="aot_eager", fullgraph=True)
        found = compiled(x_source, x_t, timesteps, kept)
        torch.testing.assert_close(found.prediction, expected.prediction)
        torch.testing.assert_close(found.latents, expected.latents)
        same_image = x_source[:1].expand(6, -1, -1, -1, -1)
        exact = soda(same_image, x_t, timesteps, kept).latents[:, 0]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = soda(same_image, x_t, timesteps, kept).latents[:, 0].float()
    moved = (exact[1::2] - exact[::2]).square().mean()  # between neighbouring timesteps
    assert (rounded - exact).square().mean() < moved / 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a time-dependent, probabilistic encoder on digits, judged at two timesteps."""
    run = tmp_path_factory.mktemp("time") / "run"
    more = ("encoder.probabilistic=true", "training.terms.kl=1e-5", "evaluation.timesteps=[90,10]")
    few = ("evaluation.probe.epochs=1", "sampling.num_images=0")
    assert train_program.main(digits_args(run, *MODEL, *SAME, *more, *few)) == 0
    return run


def checkpoint_of(run: Path) -> list[str]:
    """Returns the arguments that open the last checkpoint of the run."""
    return ["--checkpoint", str(run / "checkpoints" / "last.pt"), "device=cpu"]


def opened(run: Path, *overrides: str) -> tuple[Any, Any, Tensor]:
    """Returns the experiment, the EMA model, and the pixels of the first 20 test images."""
    trained = read_trained(None, run / "checkpoints" / "last.pt", ["device=cpu", *overrides])
    experiment, soda = open_trained(trained)
    assert experiment.test is not None
    (pixels,) = experiment.test.batches([range(20)])
    return experiment, soda, pixels


def test_a_run_reports_the_accuracy_at_each_timestep(run: Path) -> None:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (entry,) = [line for line in lines if line["kind"] == "evaluation"]
    assert {"knn@10_top1", "knn@90_top1", "probe@10_top3", "probe@90_top1"} <= entry.keys() and "knn_top1" not in entry
    table = json.loads((run / "results.json").read_text())["table"]
    assert [name.split(",")[1] for name in table] == [" unit z@10", " unit z@90"] * 2
    assert ["raw pixels" in cells for cells in table.values()] == [True, False] * 2
    assert all({"trained", "untrained"} <= cells.keys() for cells in table.values())


def test_what_needs_one_z_needs_a_timestep(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, out = checkpoint_of(run), str(tmp_path / "a.png")
    programs: list[tuple[Any, list[str]]] = [
        (sample_program, ["nearest", *checkpoint, "--out", out]),
        (embed_program, [*checkpoint, "--split", "test"]),
        (embed_program, [*checkpoint, "--export", str(tmp_path / "encoder.pt2")]),
        (judge_program, [*checkpoint, "--report"]),
        (judge_program, [*checkpoint, "--measures", "uniformity"]),
    ]
    for program, words in programs:
        with pytest.raises(SystemExit, match="2"):
            program.main(words)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "and a single z is needed: add --timestep T, from 0 to 99" in said
    for program, words, expected in (
        (sample_program, ["nearest", *checkpoint, "--timestep", "100"], "does not exist: choose one from 0 to 99\n"),
        (
            judge_program,
            [*checkpoint, "--timestep", "3"],
            "--timestep 3 is for the report and the measures: add --report or --measures, or set ",
        ),
        (
            judge_program,
            [*checkpoint, "--timestep", "9", "--measures", "feature_distance", "--features_of", checkpoint[1]],
            "z of its encoder depends on the timestep: name another checkpoint\n",
        ),
    ):
        with pytest.raises(SystemExit, match="2"):
            program.main(words)
        assert expected in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"--timestep 3 is for encoders with encoder.time_dependent=true: remove it"):
        check_timestep(load_config(ROOT / "config" / "digits.yaml"), 3)
    assert sample_program.main(["nearest", *checkpoint, "--timestep", "9", "--out", out, "--num_neighbours", "2"]) == 0
    assert judge_program.main([*checkpoint, "--timestep", "9", "--measures", "uniformity"]) == 0
    assert "effective rank (RankMe) of z@9, all test images" in capsys.readouterr().out


def test_features_at_a_timestep_are_the_same_everywhere(run: Path, tmp_path: Path) -> None:
    """The evaluation, embed.py and Python agree. An exported model does not round the frequencies to bf16."""
    checkpoint = checkpoint_of(run)
    experiment, soda, pixels = opened(run, "evaluation.timesteps=[40]")
    expected = encode_with(experiment, soda)(experiment.views.evaluation(pixels), range(20))
    assert set(expected) == {"z@40", "pooled@40"}
    words = [*checkpoint, "--timestep", "40", "--split", "test", "--out", str(tmp_path / "z.npz")]
    assert embed_program.main(words) == 0
    stored = np.load(tmp_path / "z.npz")
    for kind in ("z", "pooled"):
        np.testing.assert_allclose(stored[f"{kind}@40"][:20], expected[f"{kind}@40"], atol=1e-5)
    with pytest.raises(ConfigError, match="a single z is needed"):
        load_encoder(checkpoint[1])
    torch.testing.assert_close(load_encoder(checkpoint[1], timestep=40)(pixels)["z"], expected["z@40"])
    assert embed_program.main([*checkpoint, "--export", str(tmp_path / "model.pt")]) == 0
    rounded: Any = load_encoder(tmp_path / "model.pt", timestep=40)
    assert torch.equal(rounded.encoder.encoder.time.frequencies, soda.encoder.time.frequencies)
    assert (rounded(pixels)["z"] - expected["z@40"]).abs().max() < 2**-4 * expected["z@40"].abs().max()


@torch.no_grad()
def test_pictures_decode_the_curve_of_z_over_the_steps_of_the_sampler(run: Path) -> None:
    experiment, soda, pixels = opened(run, "sampling.num_sampling_steps=5")
    codec, pixels, diffusion = Codec(experiment, soda, seed=0), pixels[:3], experiment.diffusion
    views, z, visited = experiment.views.evaluation(pixels), codec.encode(pixels), diffusion.sampling_timesteps(5)
    assert z.shape == (3, 5, 8)
    for position, timestep in enumerate(visited):
        torch.testing.assert_close(z[:, position], soda.encoder.at(timestep)(views))
    denoise = guided_denoiser(soda.decoder, lambda timesteps: soda.encoder(views, timesteps))
    x_T = codec.noise(3, "anything")
    decoded = diffusion.ddim_sample(denoise, x_T, 5, clip_denoised=False)
    torch.testing.assert_close(codec.decode(z, x_T), decoded, rtol=1e-4, atol=1e-3)
    inverted = diffusion.ddim_invert(denoise, experiment.views.x_start(pixels), 5)
    torch.testing.assert_close(codec.invert(pixels, z), inverted, rtol=1e-3, atol=1e-3)
    fixed = Codec(experiment, soda, seed=0, timestep=visited[2])
    torch.testing.assert_close(fixed.encode(pixels), z[:, 2])
    torch.testing.assert_close(fixed.test_z[:3], z[:, 2])


def test_an_encoder_starts_from_one_with_the_same_noise_levels(run: Path, tmp_path: Path) -> None:
    """The weights come from a checkpoint, or from the .safetensors file that embed.py exports without a timestep."""
    file, checkpoint = tmp_path / "z.safetensors", checkpoint_of(run)
    assert embed_program.main([*checkpoint, "--export", str(file)]) == 0
    _, path, *words = digits_args(run, *MODEL, "encoder.probabilistic=true")
    _, soda, _ = opened(run)
    trained = read_trained(None, Path(checkpoint[1]), [])
    for source, advice in (
        (checkpoint[1], r"holds another encoder: add diffusion.sigma_max=100\.0 to"),
        (str(file), "have other noise levels: set the keys of `diffusion` to"),
    ):
        started = [*words, f"encoder.weights={source}"]
        found = read_starting_weights(load_config(path, started))["encoder"]
        assert_equal_states(found.weights, dict(soda.encoder.state_dict()))
        assert found.image_size == 8 and found.statistics == trained.statistics()
        with pytest.raises(ConfigError, match=advice):
            read_starting_weights(load_config(path, [*started, "diffusion.sigma_max=50"]))


@pytest.mark.long
def test_the_report_and_the_exports_of_a_time_dependent_encoder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge_program.main([*checkpoint_of(run), "--report", "--timestep", "40"]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^(k-NN|linear L-BFGS).* z@(\d+)", printed, flags=re.MULTILINE)
    assert [int(timestep) for _, timestep in rows] == [10, 90] * 2 and "pooled" not in printed
    page = (run / "report.html").read_text()
    assert "top-1 of z at each judged timestep" in page and "k-NN k=20 uniform, unit z@40" in page
    assert all(f'id="{name}-' in page for name in ("timesteps", "accuracy-knn", "accuracy-probe"))
    for name in ("reconstruct", "interpolate"):
        words = [name, *checkpoint_of(run), "--num_images", "2", "--out", str(tmp_path / "a.png")]
        assert sample_program.main(words) == 0
    assert sample_program.main(["nearest", *checkpoint_of(run), "--timestep", "40"]) == 0
    assert (run / "pictures" / "nearest@40.png").exists()
    assert embed_program.main([*checkpoint_of(run), "--timestep", "40", "--export", str(tmp_path / "out")]) == 0
    *_, pixels = opened(run)
    z, _ = torch.export.load(tmp_path / "out" / "encoder.pt2").module()(pixels)
    torch.testing.assert_close(z, load_encoder(checkpoint_of(run)[1], timestep=40)(pixels)["z"], rtol=1e-4, atol=1e-5)
    assert "(z is that of timestep 40)" in (tmp_path / "out" / "README.md").read_text()
