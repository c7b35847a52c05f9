"""Tests of the training step and its parts, of the encoders that are evaluated, and of the sample grid."""

import contextlib
import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from config.schema import Terms
from evaluation.encoders import baselines, encode_with, raw_pixels
from evaluation.judge import judge, judge_trained
from evaluation.protocols import config_protocols
from experiment import batch as batch_module
from experiment.batch import source_draws
from experiment.models import initial_soda
from model.soda import Denoised
from tests.conftest import assert_equal_states, batch_of, experiment_of
from training import losses
from training.loop import _log_circumstances
from training.sample_grid import sample_grid
from training.state import Summary, Tally, initial_state
from training.step import learning_rates, train_step, training_pixels
from utils.logging import PhaseTimer
from utils.randomness import image_noise

STEPS_PER_EPOCH = 1437 // 64


def test_the_loss_falls_within_20_steps(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path)
    state, pixels = initial_state(experiment), training_pixels(experiment, 0)
    losses = [train_step(experiment, state, pixels, PhaseTimer())[0].item() for _ in range(20)]
    assert 0.9 < losses[0] < 1.1, "the decoder predicts zeros at first, so the first loss must be near 1"
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]


def test_micro_batches_give_the_gradient_of_the_batch(tmp_path: Path) -> None:
    """With fixed BatchNorm statistics and no dropout, the micro-batch size changes only the rounding."""
    weights = []
    for micro in ("null", "32", "16"):
        experiment = experiment_of(tmp_path, f"training.micro_batch_size={micro}", "decoder.dropout=0.0")
        state = initial_state(experiment)
        state.soda.eval()
        state.soda.train = lambda mode=True: None
        pixels = training_pixels(experiment, 0)
        # Loss and gradient norm. AdamW alone would not notice another scale of the gradient.
        sizes = [each.item() for _ in range(3) for each in train_step(experiment, state, pixels, PhaseTimer())]
        weights.append((sizes, torch.cat([p.detach().flatten() for p in state.soda.parameters()])))
    for sizes, parameters in weights[1:]:
        assert sizes == pytest.approx(weights[0][0], rel=1e-5)
        # AdamW divides by the gradient's size, so rounding errors of near-zero gradients become visible.
        assert (parameters - weights[0][1]).abs().mean() < 1e-5


def test_a_batch_splits_into_its_parts(tmp_path: Path) -> None:
    settings = ("training.timesteps.sampling=adaptive", "views.num_sources=2", "encoder.probabilistic=true")
    experiment = experiment_of(tmp_path, *settings)
    whole, part = batch_of(experiment, 3, range(64)), batch_of(experiment, 3, range(16, 48))
    assert whole.rays is None and part.rays is None  # tests/test_posed.py has the batches of images with cameras
    for name, values in vars(whole).items():
        assert name == "rays" or torch.equal(getattr(part, name), values[16:48]), name
    assert not torch.equal(whole.x_start, batch_of(experiment, 4, range(64)).x_start)
    assert whole.timesteps.min() >= 0 and whole.timesteps.max() < 1000 and whole.timesteps.unique().numel() > 40


def test_every_draw_has_a_purpose_of_its_own(tmp_path: Path) -> None:
    """Source view, target view, source noise and the noise of diffusion use independent random streams."""
    same = "{crop_flip_probability: 1.0, crop_scale: [0.3, 0.6], randaugment_probability: 0.0}"
    experiment = experiment_of(tmp_path, f"views.source={same}", f"views.target={same}", "views.source.noise_std=0.0")
    batch = batch_of(experiment, 0, range(64))
    source = experiment.views.denormalize(batch.x_source[:, 0]) * 2 - 1
    assert (~torch.isclose(source, batch.x_start, atol=1e-3)).flatten(1).any(dim=1).sum() > 60
    noisy = experiment_of(tmp_path, f"views.source={same}", "views.source.noise_std=1.0")
    source_noise = batch_of(noisy, 0, range(64)).x_source - batch.x_source
    correlation = torch.corrcoef(torch.stack([source_noise.flatten(), batch.noise.flatten()]))[0, 1]
    assert abs(correlation) < 0.05 and abs(source_noise.std() - 1) < 0.05


def test_the_optimiser_gets_its_settings_and_clipped_gradients(tmp_path: Path) -> None:
    experiment = experiment_of(
        tmp_path, "optimizer.max_grad_norm=1e-3", "optimizer.betas=[0.8, 0.9]", "optimizer.weight_decay=0.3"
    )
    state = initial_state(experiment)
    encoder, decoder = state.optimizer.param_groups
    assert [id(p) for p in encoder["params"]] == [id(p) for p in state.soda.encoder.parameters()]
    assert [id(p) for p in decoder["params"]] == [id(p) for p in state.soda.decoder.parameters()]
    for group in (encoder, decoder):
        assert tuple(group["betas"]) == (0.8, 0.9) and group["weight_decay"] == 0.3 and group["fused"]
    norms: list[float] = []

    def look(*_: Any) -> None:
        norms.append(torch.cat([p.grad.flatten() for p in state.soda.parameters()]).norm().item())

    state.optimizer.register_step_pre_hook(look)
    _, before = train_step(experiment, state, training_pixels(experiment, 0), PhaseTimer())
    assert before.item() > 0.01 and norms == [pytest.approx(1e-3, rel=1e-3)]


def test_the_state_of_an_optimiser_on_another_device_is_read_right(tmp_path: Path) -> None:
    """Moments in another memory format are loaded correctly, and so are the counts of steps of an unfused optimiser.

    CUDA and some CPUs use channels-last, MPS has no fused AdamW, and a run may resume on another device. Counts of
    another dtype stand for those on another device.
    """
    experiment = experiment_of(tmp_path)
    state = initial_state(experiment)
    pixels = training_pixels(experiment, 0)
    for _ in range(3):
        train_step(experiment, state, pixels, PhaseTimer())
    saved = copy.deepcopy(state.state_dict())
    for moments in saved["optimizer"]["state"].values():
        for name, value in moments.items():
            if value.dim() == 4:
                last = value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()
                other = torch.contiguous_format if last else torch.channels_last
                moments[name] = value.contiguous(memory_format=other)
        moments["step"] = moments["step"].double()
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = None
    resumed = initial_state(experiment)
    resumed.load_state_dict(saved)
    assert {moments["step"].dtype for moments in resumed.optimizer.state.values()} == {torch.float32}
    for each in (state, resumed):
        train_step(experiment, each, training_pixels(experiment, 3), PhaseTimer())
    assert_equal_states(resumed.state_dict(), state.state_dict())


def test_fp16_trains_resumes_and_lowers_a_scale_that_overflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU computes fp16 as well, slowly. The gradients of two micro-batches are added while they are scaled."""
    monkeypatch.setattr("experiment.opening.choose_amp_dtype", lambda *_: torch.float16)
    sizes = ("training.batch_size=16", "training.micro_batch_size=8")
    experiment = experiment_of(tmp_path, *sizes, "optimizer.warmup_epochs=0")
    state, resumed = initial_state(experiment), initial_state(experiment)

    def train(state: Any, steps: int) -> list[float]:
        pixels = training_pixels(experiment, state.step)
        return [train_step(experiment, state, pixels, PhaseTimer())[0].item() for _ in range(steps)]

    losses = train(state, 10)
    assert sum(losses[-3:]) / 3 < 0.95 * losses[0] and state.tally.take().skipped == 0
    resumed.load_state_dict(copy.deepcopy(state.state_dict()))
    saved = resumed.scaler.state_dict()
    assert saved == state.scaler.state_dict() and (saved["scale"], saved["_growth_tracker"]) == (2**16, 10)
    assert train(resumed, 1) == train(state, 1)
    assert_equal_states(resumed.state_dict(), state.state_dict())

    resumed.tally.take()
    resumed.scaler.update(2.0**26)
    train(resumed, 1)
    assert_equal_states(resumed.soda.state_dict(), state.soda.state_dict())
    assert resumed.scaler.get_scale() == 2**25
    train(resumed, 9)
    skipped = resumed.tally.take().skipped
    assert 1 < skipped < 10 and resumed.scaler.get_scale() == 2 ** (26 - skipped)
    assert not torch.equal(resumed.soda.decoder.conv_in.weight, state.soda.decoder.conv_in.weight)


def test_the_probe_sees_augmented_views_anew_each_epoch(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, "evaluation.batch_size=2000", "evaluation.probe.epochs=2")
    seen: list[torch.Tensor] = []

    def encode(views: torch.Tensor, _: range) -> dict[str, torch.Tensor]:
        seen.append(views)
        return {"z": views.flatten(1)[:, ::16]}

    judge(experiment, {"spy": encode}, config_protocols(experiment.config))
    clean = experiment.views.evaluation(experiment.train.pixels)
    test_views, bank, first, second = seen
    assert len(test_views) == 360 and torch.equal(bank, clean)
    for augmented, other in ((first, clean), (second, clean), (first, second)):
        changed = (~torch.isclose(augmented, other)).flatten(1).any(dim=1).float().mean()
        assert changed > 0.95, "the augmentation must move nearly all digits, differently in each epoch"


def test_raw_pixels_are_the_views_or_their_averages() -> None:
    small, large = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 64, 64)
    assert torch.equal(raw_pixels(small, 1000), small.flatten(1))
    torch.testing.assert_close(raw_pixels(large, 100_000), F.avg_pool2d(large, 2).flatten(1))
    torch.testing.assert_close(raw_pixels(large, 1_281_167), F.avg_pool2d(large, 4).flatten(1))
    assert raw_pixels(large, 10**8).shape == (2, 3)


def test_the_untrained_encoder_has_settled_and_differs_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its statistics are those of the inputs of each layer in 20 passes: means, and means of unbiased variances."""
    experiment = experiment_of(tmp_path)
    assert experiment.test is not None
    views = experiment.views.evaluation(experiment.test.pixels[:8])
    fresh = initial_state(experiment).soda.encoder.eval()
    settled = copy.deepcopy(fresh).train()
    inputs: dict[torch.nn.Module, list[torch.Tensor]] = {}
    for layer in settled.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            inputs[layer] = []
            layer.register_forward_pre_hook(lambda layer, args: inputs[layer].append(args[0]))
    with torch.no_grad():
        for step in range(20):
            settled(batch_of(experiment, step, range(64)).x_source[:, 0])
    for layer, seen in inputs.items():
        layer.running_mean = torch.cat(seen).mean(dim=(0, 2, 3))
        layer.running_var = torch.stack([x.var(dim=(0, 2, 3)) for x in seen]).mean(dim=0)
    found = baselines(experiment)["untrained"](views, range(8))["z"]
    torch.testing.assert_close(found, settled.eval()(views), atol=1e-4, rtol=1e-4)
    # The column "settled" of test.py has the encoder that it judges with the same statistics.
    monkeypatch.setattr("evaluation.judge.judge", lambda experiment, encoders, protocols: encoders)
    judged: Any = judge_trained(experiment, initial_state(experiment).soda, [])
    assert list(judged) == ["trained", "settled", "untrained", "raw pixels"]
    alone = judge_trained(experiment, initial_state(experiment).soda, [], with_baselines=False)
    assert list(alone) == ["trained"]
    columns = {name: judged[name](views, range(8))["z"] for name in ("trained", "settled")}
    torch.testing.assert_close(columns["settled"], found, atol=1e-4, rtol=1e-4)
    assert not torch.isclose(columns["trained"], found, atol=1e-3).all(dim=1).any()
    assert not torch.isclose(found, fresh(views), atol=1e-3).all(dim=1).any()
    other = baselines(experiment_of(tmp_path, "seed=5"))["untrained"](views, range(8))["z"]
    assert not torch.isclose(found, other, atol=1e-3).all(dim=1).any()


@pytest.mark.parametrize("size", [8, 4])
def test_features_of_the_decoder_are_its_activations_without_a_latent(tmp_path: Path, size: int) -> None:
    smaller = ("decoder.attn_resolutions=[]", f"decoder.image_size={size}")
    experiment = experiment_of(tmp_path, "evaluation.features=decoder.up.1@20", *smaller)
    soda = initial_state(experiment).soda.eval()
    with torch.no_grad():
        for parameter in soda.decoder.parameters():
            parameter.add_(0.05)  # at first, the last layers are zero and hide the latent and the timestep
    assert experiment.test is not None
    (pixels,) = experiment.test.batches([range(3, 10)])
    encode = encode_with(experiment, soda)
    found = encode(experiment.views.evaluation(pixels), range(3, 10))["decoder.up.1@20"]
    # The same features computed by hand: noise by sample index, a zero latent, and the block's mean over pixels.
    noise = image_noise((3, size, size), range(12), 0, "features", device=experiment.device)[3:10]
    share = experiment.diffusion.alphas_cumprod[20]
    x_start = F.avg_pool2d(pixels / 127.5 - 1, 8 // size)
    x_t = share.sqrt() * x_start + (1 - share).sqrt() * noise
    seen: list[torch.Tensor] = []
    soda.decoder.up[1].register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        soda.decoder(x_t, torch.full((7,), 20), torch.zeros(7, 8))
    torch.testing.assert_close(found, seen[0].mean(dim=(2, 3)), atol=1e-5, rtol=1e-4)
    parts = [encode(experiment.views.evaluation(pixels[i : i + 1]), range(3 + i, 4 + i)) for i in range(7)]
    together = torch.cat([part["decoder.up.1@20"] for part in parts])
    torch.testing.assert_close(together, found, atol=1e-5, rtol=1e-4)


def test_samples_depend_on_the_latent_and_on_the_guidance(tmp_path: Path) -> None:
    grids: list[torch.Tensor] = []
    for guidance_scale in (1.0, 1.0, 4.0):
        # Three images do not fill a chunk of four, whose samples share a seed.
        experiment = experiment_of(tmp_path, f"sampling.guidance_scale={guidance_scale}", "sampling.num_images=3")
        soda = initial_state(experiment).soda
        with torch.no_grad():
            for parameter in soda.decoder.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
            if len(grids) == 1:
                soda.encoder.fc.weight.mul_(5)
        grids.append(sample_grid(experiment, soda))
    plain, other_latent, guided = grids
    assert plain.shape == (3, 3 * 66 + 2, 3 * 66 + 2)
    for grid in (other_latent, guided):
        assert torch.equal(grid[:, :66], plain[:, :66]) and torch.equal(grid[:, 134:], plain[:, 134:])
        assert not torch.equal(grid[:, 68:134], plain[:, 68:134])


def test_warmup_is_linear_in_steps_then_constant(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _log_circumstances(experiment_of(tmp_path, "optimizer.warmup_epochs=20", "training.epochs=5"))
    assert "ends before the warm-up of 20 (optimizer.warmup_epochs): the learning rates reach 25 %" in caplog.text
    experiment = experiment_of(tmp_path, "optimizer.warmup_epochs=1.0", "optimizer.decoder_lr=1e-3")
    encoder, decoder = zip(*(learning_rates(experiment, step) for step in range(30)), strict=True)
    expected = [min(1.0, (step + 1) / STEPS_PER_EPOCH) for step in range(30)]
    assert encoder == pytest.approx([2e-3 * f for f in expected]) and decoder == pytest.approx(
        [1e-3 * f for f in expected]
    )


def test_each_part_is_trained_with_its_own_rate_of_the_step(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, "optimizer.warmup_epochs=0.2", "optimizer.decoder_lr=1e-3")  # 4.4 steps
    state, pixels = initial_state(experiment), training_pixels(experiment, 0)
    used: list[list[float]] = []

    def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        parts = state.soda.encoder, state.soda.decoder
        assert all(len({groups[id(each)] for each in part.parameters()}) == 1 for part in parts)
        used.append([groups[id(next(part.parameters()))] for part in parts])

    state.optimizer.register_step_pre_hook(record)
    for _ in range(6):
        train_step(experiment, state, pixels, PhaseTimer())
    factors = [min(1.0, (step + 1) / 4) for step in range(6)]
    assert used == [pytest.approx([2e-3 * factor, 1e-3 * factor]) for factor in factors]


def test_dropout_masks_differ_between_steps_and_micro_batches(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, "decoder.dropout=0.5", "training.micro_batch_size=32")
    state, pixels = initial_state(experiment), training_pixels(experiment, 0)
    masks: list[torch.Tensor] = []
    dropout = next(module for module in state.soda.decoder.modules() if isinstance(module, torch.nn.Dropout))
    dropout.register_forward_hook(lambda _, args, out: masks.append((out != 0)[args[0] != 0]))
    for _ in range(2):
        train_step(experiment, state, pixels, PhaseTimer())
    assert len(masks) == 4 and all(0.4 < mask.float().mean() < 0.6 for mask in masks)
    for mask, other in itertools.combinations(masks, 2):
        assert 0.4 < (mask == other).float().mean() < 0.6, "independent masks agree in half of the values"


def test_a_cosine_falls_from_the_warm_up_to_zero(tmp_path: Path) -> None:
    experiment = experiment_of(
        tmp_path, "optimizer.schedule=cosine", "optimizer.warmup_epochs=0.5", "training.epochs=2"
    )
    rates = [learning_rates(experiment, step)[0] for step in range(2 * STEPS_PER_EPOCH)]
    assert rates[:11] == pytest.approx([2e-3 * (step + 1) / 11 for step in range(11)])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 33)
    for rate in rates[11:]:
        assert rate == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert theirs.get_last_lr()[0] == pytest.approx(0) and rates[-1] > 0


def test_a_cool_down_ends_a_constant_rate(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, "optimizer.cooldown_epochs=0.5", "training.epochs=2")
    rates = [learning_rates(experiment, step)[0] for step in range(2 * STEPS_PER_EPOCH)]
    warmup = [2e-3 * (step + 1) / 2 for step in range(2)]  # TINY_RUN has a warm-up of a tenth of an epoch
    assert rates[: 2 * STEPS_PER_EPOCH - 11] == pytest.approx([*warmup, *[2e-3] * (2 * STEPS_PER_EPOCH - 13)])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-3)
    theirs = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=11)
    for rate in rates[-11:]:
        assert rate == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert theirs.get_last_lr()[0] == pytest.approx(0) and rates[-1] > 0


@pytest.mark.parametrize("power", [2 / 3, 0.9])
def test_the_ema_follows_its_closed_form(tmp_path: Path, power: float) -> None:
    """The n-th update is average += w (value - average), w = max(n^-power, 1 - ema_decay).

    The first update copies the value, because w is 1.
    """
    experiment = experiment_of(tmp_path, f"training.ema_power={power}", "training.ema_decay=0.5")
    state = initial_state(experiment)
    assert not state.ema.ema_model.training and not any(p.requires_grad for p in state.ema.ema_model.parameters())
    assert state.ema.step.device.type == state.ema.initted.device.type == "cpu", "these counters must stay on the host"
    averages: dict[str, torch.Tensor] = {}
    pixels = training_pixels(experiment, 0)
    for n in range(1, 6):
        train_step(experiment, state, pixels, PhaseTimer())
        weight = max(n**-power, 0.5)
        values = {name: value.double() for name, value in state.soda.state_dict().items() if value.is_floating_point()}
        averages = {name: averages.get(name, value).lerp(value, weight) for name, value in values.items()}
        assert state.ema.get_current_decay() == pytest.approx(1 - weight, abs=1e-6)
    assert len(averages) > 50
    found = state.ema.ema_model.state_dict()
    for name, value in averages.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-7, msg=name)


def test_the_model_denoises_the_noised_target_of_its_batch(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, "decoder.dropout=0.0")
    state = initial_state(experiment)
    calls: list[tuple[Any, Denoised]] = []

    def spy(*inputs: torch.Tensor) -> Denoised:
        calls.append((inputs, state.soda(*inputs)))
        return calls[-1][1]

    state.wrapped = spy
    loss, _ = train_step(experiment, state, training_pixels(experiment, 0), PhaseTimer())
    (x_source, x_t, timesteps, drop_mask, latent_noise, rays), (eps, *_) = calls[0]
    batch = batch_of(experiment, 0, range(64))
    assert latent_noise is None and rays is None
    share = experiment.diffusion.alphas_cumprod[batch.timesteps][:, None, None, None]
    torch.testing.assert_close(x_t.double(), share.sqrt() * batch.x_start + (1 - share).sqrt() * batch.noise)
    for given, drawn in ((x_source, batch.x_source), (timesteps, batch.timesteps), (drop_mask, batch.drop_mask)):
        assert torch.equal(given, drawn)
    assert loss.item() == pytest.approx((eps - batch.noise).square().mean().item(), rel=1e-6)


def test_a_probabilistic_encoder_draws_its_latents_and_is_pulled_towards_a_standard_normal(tmp_path: Path) -> None:
    """Both terms are compared with torch's distributions. z is drawn with the noise of the batch."""
    probabilistic = ("encoder.probabilistic=true", "views.num_sources=2", "decoder.dropout=0.0")
    experiment = experiment_of(tmp_path, *probabilistic, "training.terms.kl=0.5", "training.terms.l1=0.25")
    state, batch = initial_state(experiment), batch_of(experiment, 0, range(64))
    assert batch.latent_noise is not None and batch.latent_noise.shape == (64, 2, state.soda.encoder.latent_dim)
    soda, given = copy.deepcopy(state.soda).train(), (torch.zeros_like(batch.x_start), batch.timesteps, batch.drop_mask)
    with torch.no_grad():
        for parameter in soda.decoder.parameters():
            parameter.add_(0.05)  # at first, the last layers are zero and hide the latent
        denoised = soda(batch.x_source, *given, batch.latent_noise)
        normal = Normal(denoised.latents, (denoised.log_variances / 2).exp())
        z = (normal.loc + normal.scale * batch.latent_noise).mean(dim=1)
        expected = soda.decoder(*given[:2], soda.decoder.mask(z, batch.drop_mask))
        torch.testing.assert_close(denoised.prediction, expected)
        assert not torch.allclose(soda(batch.x_source, *given).prediction, expected, rtol=1e-3)
        assert torch.equal(soda.encode(batch.x_source), denoised.latents.mean(dim=1)), "elsewhere, z is the mean"
    half = batch.x_start[0].numel() / 2
    divergence = kl_divergence(normal, Normal(torch.zeros(()), torch.ones(()))).sum(dim=-1).mean() / half
    norm = denoised.latents.norm(p=1, dim=-1).mean() / half

    total, _ = train_step(experiment, state, training_pixels(experiment, 0), PhaseTimer())
    found = state.tally.take().losses
    assert found["kl"] == pytest.approx(divergence.item(), rel=1e-4)
    assert found["l1"] == pytest.approx(norm.item(), rel=1e-4)
    assert total.item() == pytest.approx(found["denoising"] + 0.5 * found["kl"] + 0.25 * found["l1"], rel=1e-5)
    for _ in range(12):
        train_step(experiment, state, training_pixels(experiment, state.step), PhaseTimer())
    assert state.tally.take().losses["kl"] < 0.9 * found["kl"]


def test_a_second_loss_term_is_added_and_logged_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.TERMS, "size", lambda found: found.prediction.square().mean())
    monkeypatch.setattr(losses, "term_weights", lambda config: {"denoising": 1.0, "size": 0.25})
    experiment = experiment_of(tmp_path)
    state, pixels = initial_state(experiment), training_pixels(experiment, 0)
    totals = [train_step(experiment, state, pixels, PhaseTimer())[0].item() for _ in range(3)]
    found = state.tally.take().losses
    assert list(found) == ["loss", "denoising", "size"] and found["size"] > 0
    assert found["loss"] == pytest.approx(found["denoising"] + 0.25 * found["size"], rel=1e-5)
    assert found["loss"] == pytest.approx(sum(totals) / 3, rel=1e-5)


def test_every_term_has_a_weight_in_the_config() -> None:
    assert set(losses.TERMS) == {"denoising", *Terms.model_fields}


def test_the_first_source_view_has_streams_without_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other names would change the random numbers of every run."""
    names: list[str] = []
    monkeypatch.setattr(batch_module, "image_noise", lambda *args, **_: names.append(args[3]))
    monkeypatch.setattr(batch_module, "view_draw", lambda *args: names.append(args[2]))
    source_draws(experiment_of(tmp_path), 2, range(4), "source", 7)
    assert names == ["source noise", "source view", "source noise 1", "source view 1"]


def test_the_grid_is_sampled_from_the_mean_of_all_source_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = experiment_of(tmp_path, "views.num_sources=2")
    soda, seen = initial_state(experiment).soda, []
    encode = soda.encode
    monkeypatch.setattr(soda, "encode", lambda x_source: encode(seen.append(x_source) or x_source))  # type: ignore[func-returns-value]
    sample_grid(experiment, soda)
    (x_source,) = seen
    assert x_source.shape == (4, 2, 3, 8, 8) and not torch.equal(x_source[:, 0], x_source[:, 1])

    def first_views(experiment: Any, soda: Any, x_source: torch.Tensor, *_: Any) -> torch.Tensor:
        return experiment.views.denormalize(x_source[:, 0]) * 2 - 1

    monkeypatch.setattr("training.sample_grid.sample_from_views", first_views)
    sources, samples, _ = sample_grid(experiment, soda)[:, 2:].split(66, dim=1)  # 64 px, and 2 px between the rows
    assert torch.equal(sources, samples), "each sample is below its own source"


def test_more_source_views_leave_all_other_draws_as_they_are(tmp_path: Path) -> None:
    one, three = (batch_of(experiment_of(tmp_path, f"views.num_sources={n}"), 2, range(8, 24)) for n in (1, 3))
    assert three.x_source.shape == (16, 3, 3, 8, 8) and torch.equal(three.x_source[:, :1], one.x_source)
    for name in ("x_start", "timesteps", "noise", "drop_mask"):
        assert torch.equal(getattr(one, name), getattr(three, name)), name
    pairs = (three.x_source[:, a] - three.x_source[:, b] for a, b in ((0, 1), (0, 2), (1, 2)))
    assert all(each.abs().flatten(1).max(dim=1).values.min() > 0.1 for each in pairs), "views must differ"
    plain = ("views.source.affine_probability=0.0", "views.source.noise_std=1.0", "views.num_sources=2")
    first, second = batch_of(experiment_of(tmp_path, *plain), 2, range(64)).x_source.unbind(dim=1)
    assert abs((first - second).std().item() - 2**0.5) < 0.02, "each view must have noise of its own"


@pytest.mark.parametrize("prediction", ["eps", "v", "x_start"])
def test_min_snr_and_reconstruction_in_a_step(tmp_path: Path, prediction: str) -> None:
    """The loss of a step is the weighted sum of both terms, computed here in float64 from their definitions."""
    settings = (f"diffusion.prediction={prediction}", "training.min_snr_gamma=5", "training.terms.reconstruction=0.5")
    experiment = experiment_of(tmp_path, *settings, "decoder.dropout=0.0", "diffusion.schedule=cosine")
    state = initial_state(experiment)
    for parameter in state.soda.decoder.parameters():  # zero-initialised layers would predict zeros
        parameter.data.add_(0.05)
    batch = batch_of(experiment, 0, range(64))
    a = experiment.diffusion.alphas_cumprod[batch.timesteps].sqrt()[:, None, None, None]
    s, x_start = (1 - a**2).sqrt(), batch.x_start.double()
    x_t = experiment.diffusion.q_sample(batch.x_start, batch.timesteps, batch.noise)
    found = state.soda.train()(batch.x_source, x_t, batch.timesteps, batch.drop_mask).prediction.detach().double()
    clean = {"eps": (x_t - s * found) / a, "v": a * x_t - s * found, "x_start": found}[prediction]
    squares, snr = (clean - x_start).square(), (a / s) ** 2
    expected = (snr.clamp(max=5) * squares).mean() + 0.5 * squares.mean()
    state = initial_state(experiment)
    for parameter in state.soda.decoder.parameters():
        parameter.data.add_(0.05)
    loss, _ = train_step(experiment, state, training_pixels(experiment, 0), PhaseTimer())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert list(state.tally.take().losses) == ["loss", "denoising", "reconstruction"]


def test_a_module_beside_encoder_and_decoder_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_head(*args: Any) -> Any:
        soda = initial_soda(*args)
        soda.head = torch.nn.Linear(8, 1)
        return soda

    monkeypatch.setattr("training.state.initial_soda", with_head)
    state = initial_state(experiment_of(tmp_path, "optimizer.decoder_lr=1e-3"))
    encoder, others = state.optimizer.param_groups
    assert others["params"][-1] is state.soda.head.bias and others["lr"] == 1e-3
    assert len(encoder["params"]) + len(others["params"]) == len(list(state.soda.parameters()))


def with_nan_at(experiment: Any, *steps: int) -> Any:
    """Returns a copy of the experiment in which one pixel of one image is NaN at the given steps."""

    class Views(type(experiment.views)):  # type: ignore[misc]
        calls = 0

        def pair(self, *args: Any) -> Any:
            x_source, x_start = super().pair(*args)
            if Views.calls in steps:
                x_start[5, 0, 3, 3] = math.nan
            Views.calls += 1
            return x_source, x_start

    views = copy.copy(experiment.views)
    views.__class__ = Views
    return replace(experiment, views=views)


@pytest.mark.parametrize(("bad_steps", "fused"), [((0,), True), ((2, 3, 5), True), ((0, 3), False)])
def test_nothing_of_a_step_that_is_not_finite_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_steps: tuple[int, ...], fused: bool
) -> None:
    """This is so with optimisers that can skip a step on the device, and, on a Mac, without them."""
    if not fused:
        monkeypatch.setattr("training.step.FUSED", ())
        monkeypatch.setattr("training.state.FUSED", ())
    adaptive = "training.timesteps.sampling=adaptive"  # its history must not change either
    experiment = with_nan_at(experiment_of(tmp_path, "optimizer.warmup_epochs=0", adaptive), *bad_steps)
    state, undisturbed = initial_state(experiment), initial_state(experiment)
    pixels = training_pixels(experiment, 0)
    counted = {"step", "tally"}
    for step in range(7):
        before = copy.deepcopy({name: value for name, value in state.state_dict().items() if name not in counted})
        _, grad_norm = train_step(experiment, state, pixels, WatchedPhases() if fused else PhaseTimer())
        after = {name: value for name, value in state.state_dict().items() if name not in counted}
        assert grad_norm.isfinite() == (step not in bad_steps)
        if step in bad_steps:
            if step == 0:  # the optimiser creates its moments at this step
                moments = [value for each in after["optimizer"].pop("state").values() for value in each.values()]
                assert (len(moments) > 100) == fused and not any(value.any() for value in moments)
                del before["optimizer"]["state"]
            ema, ema_before = after.pop("ema"), before.pop("ema")
            assert_equal_states(after, before)
            # The EMA still moves towards the weights, which have not changed.
            weight = (step + 1) ** (-2 / 3)
            for name, value in ema["model"].items():
                if value.is_floating_point():
                    expected = ema_before["model"][name].lerp(after["model"][name], weight)
                    torch.testing.assert_close(value, expected, msg=name)
        else:
            means = [saved["ema"]["model"]["encoder.bn1.running_mean"] for saved in (before, after)]
            assert not torch.equal(*means)
    assert state.step == 7
    # A run of only the finite steps, each with the images of its own step, ends with the same weights.
    clean = replace(experiment, views=experiment_of(tmp_path).views)
    for step in range(7):
        if step not in bad_steps:
            undisturbed.step = step
            train_step(clean, undisturbed, training_pixels(clean, step), PhaseTimer())
    for part in ("model", "optimizer"):
        assert_equal_states(state.state_dict()[part], undisturbed.state_dict()[part], part)
    assert all(value.isfinite().all() for value in state.ema.ema_model.state_dict().values())


def test_a_step_is_skipped_if_only_the_norm_of_the_gradient_overflows(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path)
    state = initial_state(experiment)
    state.soda.decoder.conv_out.weight.register_hook(lambda gradient: gradient * 1e30)
    before = copy.deepcopy(state.soda.state_dict())
    _, norm = train_step(experiment, state, training_pixels(experiment, 0), PhaseTimer())
    assert norm.isinf() and state.tally.take().skipped == 1
    assert_equal_states(state.soda.state_dict(), before)


def test_the_tally_is_of_the_steps_that_were_not_skipped() -> None:
    """The tally averages the losses of the steps that were not skipped, and counts the skipped ones."""
    tally = Tally(torch.device("cpu"), ["loss", "other"])
    rows = [[0, 0, 1, 0], [1, 1, 0, 1, 1], [1, 1, 1, 0], [1, 1]]
    expected = [(2.0, 1, 1), (3.0, 4, 2), (4.0, 3, 5), (math.nan, 2, 2)]
    for number, (row, (loss, skipped_steps, in_a_row)) in enumerate(zip(rows, expected, strict=True)):
        for skipped in row:
            value = torch.tensor(math.nan if skipped else 2.0 + number)
            tally.add({"loss": value, "other": 2 * value}, torch.tensor(float(skipped)))
        found = tally.take()
        assert found.losses == pytest.approx({"loss": loss, "other": 2 * loss}, nan_ok=True)
        assert (found.skipped, found.most_in_a_row) == (skipped_steps, in_a_row)


def test_the_sums_of_a_checkpoint_have_names(tmp_path: Path) -> None:
    tally = Tally(torch.device("cpu"), ["loss"])
    for skipped in (0.0, 1.0, 1.0):
        tally.add({"loss": torch.tensor(0.5)}, torch.tensor(skipped))
    saved = tally.state_dict()
    assert {name: value.item() for name, value in saved.items()} == {
        "loss": 0.5,
        "steps": 3,
        "skipped": 2,
        "row": 2,
        "longest_row": 2,
    }
    again = Tally(torch.device("cpu"), ["loss"])
    again.load_state_dict(saved)
    assert torch.equal(again.values, tally.values) and again.take() == Summary({"loss": 0.5}, 2, 2)
    # A row that has ended does not end the run that resumes; one that has not ended still counts.
    for skipped, in_a_row in ((1.0, 3), (0.0, 0)):
        tally.add({"loss": torch.tensor(0.5)}, torch.tensor(skipped))
        resumed = Tally(torch.device("cpu"), ["loss"])
        resumed.load_state_dict(tally.state_dict())
        assert resumed.take().most_in_a_row == in_a_row


class NoHostReads(TorchDispatchMode):
    """Dispatch mode that fails if an operation needs a tensor's value on the host. On a GPU this would synchronise."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
        assert function.overloadpacket.__name__ not in reads, f"{function} synchronises with the device during the step"
        return function(*args, **(kwargs or {}))


class WatchedPhases(PhaseTimer):
    """Phase timer that runs phases under NoHostReads.

    The phases "images", "views" and "EMA" are exempt, because they draw or read values on the host.
    """

    def phase(self, name: str) -> Any:
        on_host = ("images", "views", "EMA")
        watched = NoHostReads() if name not in on_host else contextlib.nullcontext()
        stack = contextlib.ExitStack()
        stack.enter_context(super().phase(name))
        stack.enter_context(watched)
        return stack


LEVERS = (
    *("training.timesteps.sampling=adaptive", "training.min_snr_gamma=5", "training.terms.reconstruction=0.1"),
    *("diffusion.prediction=v", "views.num_sources=2"),
)


@pytest.mark.parametrize("settings", [(), LEVERS], ids=["default", "levers"])
def test_a_step_reads_nothing_from_the_device(tmp_path: Path, settings: tuple[str, ...]) -> None:
    experiment = experiment_of(tmp_path, "training.micro_batch_size=16", *settings)
    state = initial_state(experiment)
    with NoHostReads():
        state.timestep_sampler.draw(torch.Generator(), 64, slice(0, 32))
        state.timestep_sampler.end_step(100)
    pixels = training_pixels(experiment, 0)
    for _ in range(2):
        train_step(experiment, state, pixels, WatchedPhases())
    with pytest.raises(AssertionError, match="_local_scalar_dense"), WatchedPhases().phase("update"):
        torch.ones(1).item()
