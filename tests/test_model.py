"""Tests of the model: sizes, AdaGN, initial weights, FLOPs and the encoders."""

import copy
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
import torchvision
from diffusers.models.embeddings import get_timestep_embedding
from scipy.stats import truncnorm
from torch import nn

from config.reading import load_config
from experiment.models import build_on_meta, describe_model
from model.blocks import AdaGN, CrossAttention, ResBlock, SelfAttention, group_norm, timestep_embedding
from model.build import ENCODERS, build_soda, forward_flops
from model.decoder import UNetDecoder
from model.names import Architecture, ResNet, Stem, WideResNet
from model.resnets import ARCHITECTURES, ResNetEncoder, WideResNetEncoder
from model.sizes import last_strided_input, num_decoder_modules, num_sections, resolutions
from model.soda import SODA
from tests.conftest import ROOT, assert_equal_states, experiment_of
from training.state import initial_state
from training.step import train_step, training_pixels
from utils.logging import PhaseTimer


def test_cifar10_model_has_the_published_size_and_work() -> None:
    config = load_config(ROOT / "config" / "cifar10.yaml")
    soda = build_on_meta(config)
    assert sum(p.numel() for p in soda.encoder.parameters()) == 11_234_496
    assert sum(p.numel() for p in soda.decoder.parameters()) == 39_595_139
    assert [round(flops / 1e9, 3) for flops in forward_flops(soda, 32, 32)] == [1.111, 12.451]
    frozen = config.model_copy(update={"encoder": config.encoder.model_copy(update={"frozen": True})})
    assert "training: about 40.69 GFLOP per image" in describe_model(config)
    assert "training: about 38.47 GFLOP per image" in describe_model(frozen), "1.1112 + 3 * 12.4513"


def test_tiny_attends_on_the_maps_of_the_reference() -> None:
    """Self-attention is on the 32x32 feature maps, not on the 16x16 ones.

    The reference implementation indexes its attention flags by level. At 64 px, the flagged level has 32x32 maps.
    """
    config = load_config(ROOT / "config" / "tiny.yaml")
    soda = build_on_meta(config)
    attending = {stage.resolution for stage in [*soda.decoder.down, *soda.decoder.up] if getattr(stage, "attention", 0)}
    assert attending == {32}
    assert round(forward_flops(soda, config.encoder_size, config.decoder_size)[1] / 1e9, 1) == 53.8


def test_every_encoder_has_the_layers_of_torchvisions_resnet() -> None:
    for architecture in ARCHITECTURES:
        with torch.device("meta"):
            theirs = torchvision.models.get_model(architecture, weights=None, num_classes=16)
            ours = ResNetEncoder(architecture=architecture, stem="imagenet", width=64, latent_dim=16)
        ours.load_state_dict(theirs.state_dict(), assign=True)


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "wide_resnet50_2"])
def test_encoder_is_torchvisions_resnet(architecture: ResNet) -> None:
    theirs = torchvision.models.get_model(architecture, weights=None, num_classes=16).eval()
    ours = ResNetEncoder(architecture=architecture, stem="imagenet", width=64, latent_dim=16).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))
        torch.testing.assert_close(ours.fc(ours.features(images)["pooled"]), ours.features(images)["z"])


def pre_activation_wide_resnet(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Returns the logits of a Wide ResNet of 28 layers in evaluation mode, from its weights."""

    def norm_relu(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, scale, shift = (
            weights[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(x, mean, var, scale, shift))

    x = F.conv2d(x, weights["conv1.weight"], padding=1)
    for group in (1, 2, 3):
        for index in range(4):
            block, stride = f"layer{group}.{index}", 2 if group > 1 and index == 0 else 1
            active = norm_relu(x, f"{block}.bn1")
            h = F.conv2d(active, weights[f"{block}.conv1.weight"], stride=stride, padding=1)
            h = F.conv2d(norm_relu(h, f"{block}.bn2"), weights[f"{block}.conv2.weight"], padding=1)
            x = h + (F.conv2d(active, weights[f"{block}.skip.weight"], stride=stride) if len(h[0]) != len(x[0]) else x)
    return norm_relu(x, "bn").mean(dim=(2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]


@pytest.mark.parametrize(
    ("architecture", "parameters", "convolutions"),
    [("wide_resnet28_1", 369_498, 27), ("wide_resnet28_2", 1_467_610, 28), ("wide_resnet28_8", 23_354_842, 28)],
)
def test_wide_resnet_is_the_published_one(architecture: WideResNet, parameters: int, convolutions: int) -> None:
    """With 10 outputs, WRN-28-2 has 1.47 million parameters and WRN-28-8 has 23.4 million."""
    torch.manual_seed(0)
    ours = WideResNetEncoder(architecture=architecture, stem="small", width=64, latent_dim=10).eval()
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert sum(isinstance(module, nn.Conv2d) for module in ours.modules()) == convolutions
    assert ours.pooled_dim == 64 * int(architecture.split("_")[-1])
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
    images = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        expected = pre_activation_wide_resnet(ours.state_dict(), images)
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("architecture", "latent_dim"),
    [*zip(ARCHITECTURES, [1, 7, 16, 100, 33, 128, 515], strict=True), ("wide_resnet28_1", 9)],
)
def test_every_encoder_trains_with_a_latent_of_any_width(architecture: str, latent_dim: int, tmp_path: Path) -> None:
    width = 64 if architecture in get_args(WideResNet) else 4
    chosen = {"architecture": architecture, "latent_dim": latent_dim, "width": width}
    experiment = experiment_of(tmp_path, *(f"encoder.{name}={value}" for name, value in chosen.items()))
    state, pixels = initial_state(experiment), training_pixels(experiment, 0)
    before = [parameter.clone() for parameter in state.soda.encoder.parameters()]
    losses = [train_step(experiment, state, pixels, PhaseTimer())[0] for _ in range(4)]
    assert torch.stack(losses).isfinite().all() and losses[-1] < losses[0]
    # Four steps, because the encoder's gradient is zero in the first two: layers of the decoder start at zero.
    assert not any(map(torch.equal, state.soda.encoder.parameters(), before))
    features = state.soda.encoder.features(torch.zeros(2, 3, 8, 8))
    assert features["z"].shape == (2, latent_dim) and features["pooled"].shape[1] in (32, 64, 128)


def test_small_stem_keeps_the_resolution() -> None:
    encoder = ResNetEncoder(architecture="resnet18", stem="small", width=8, latent_dim=4)
    assert encoder.maxpool(encoder.conv1(torch.zeros(1, 3, 32, 32))).shape == (1, 8, 32, 32)
    assert encoder.features(torch.zeros(2, 3, 32, 32))["pooled"].shape == (2, 64)


def test_the_encoders_initial_weights_are_torchvisions() -> None:
    for architecture in ("resnet18", "resnet50"):
        torch.manual_seed(0)
        theirs = torchvision.models.get_model(architecture, weights=None, num_classes=16)
        torch.manual_seed(0)
        ours = ResNetEncoder(architecture=architecture, stem="imagenet", width=64, latent_dim=16)
        assert_equal_states(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_torchs_initial_weights() -> None:
    """With initialization=torch, the layers that start at zero have torch's weights. All others keep theirs."""
    encoder = {"architecture": "resnet18", "stem": "small", "width": 8, "latent_dim": 8}
    decoder = {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8]}
    decoder |= {"num_head_channels": None, "dropout": 0.0}
    torch.manual_seed(0)
    expected = build_soda(8, encoder, decoder)
    zeros = {name: m for name, m in expected.named_modules() if isinstance(m, nn.Conv2d) and not m.weight.any()}
    assert {name.rpartition(".")[2] for name in zeros} == {"conv2", "proj", "conv_out"} and len(zeros) == 13
    for layer in zeros.values():
        layer.load_state_dict(nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size).state_dict())  # type: ignore[arg-type]
    torch.manual_seed(0)
    ours = build_soda(8, encoder, decoder, "torch")
    assert_equal_states(dict(ours.state_dict()), dict(expected.state_dict()))


def test_the_papers_initial_weights() -> None:
    """The weights have the paper's distributions, and the signal keeps its size through the decoder.

    The division of residual sums by sqrt(2) is there to keep this size.
    """
    torch.manual_seed(0)
    encoder = {"architecture": "resnet18", "stem": "small", "width": 16, "latent_dim": 32}
    decoder = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 2, "attn_resolutions": [8]}
    soda = build_soda(16, encoder, {**decoder, "num_head_channels": None, "dropout": 0.0}, "paper")
    layers = {name: m for name, m in soda.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    for name, layer in layers.items():
        weight = layer.weight.detach()
        fan_in, fan_out = weight[0].numel(), len(weight) * weight[0, 0].numel()
        if name.startswith("encoder."):
            bound = (6 / (fan_in + fan_out)) ** 0.5
            std = bound / 3**0.5
        else:
            std = fan_in**-0.5
            bound = 2 * std / truncnorm(-2, 2).std()
        assert weight.abs().max() <= bound
        assert layer.bias is None or layer.bias.eq(0).all()
        if weight.numel() > 10_000:
            assert weight.std().item() == pytest.approx(std, rel=0.02), name
            assert weight.abs().max().item() == pytest.approx(bound, rel=0.02), name
    sizes: list[float] = []
    for module in soda.decoder.modules():
        if isinstance(module, ResBlock):
            module.register_forward_hook(lambda _, args, out: sizes.append(out.std().item()))
    with torch.no_grad():
        soda.decoder(torch.randn(8, 3, 16, 16), torch.full((8,), 500), torch.randn(8, 32))
    assert len(sizes) == 12 and min(sizes) > 0.5 and max(sizes) < 2


def test_residual_sums_are_divided_by_sqrt_2() -> None:
    """With `rescale_residual`, the output is that of the same weights without it, divided by sqrt(2)."""
    x, time, latent = torch.randn(2, 8, 4, 4), torch.randn(2, 6), torch.randn(2, 5)
    found: dict[bool, list[torch.Tensor]] = {}
    for rescale in (False, True):
        torch.manual_seed(0)
        block = ResBlock(8, 12, 6, 5, dropout=0.0, scale_offset=1.0, rescale_residual=rescale)
        attention = SelfAttention(8, None, rescale_residual=rescale)
        for last in (block.conv2, attention.proj):  # these layers start at zero, which would hide the branch
            torch.nn.init.normal_(last.weight)
        found[rescale] = [block(x, time, latent), attention(x)]
        assert not torch.allclose(found[rescale][1], x)
    for plain, rescaled in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(rescaled, plain / 2**0.5)


def test_timestep_embedding_is_the_fields() -> None:
    """The timestep embedding equals that of diffusers."""
    timesteps = torch.tensor([0, 1, 17, 500, 999])
    theirs = get_timestep_embedding(timesteps, 128, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(timesteps, 128), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_adagn_is_the_papers_equation(offset: float) -> None:
    torch.manual_seed(0)
    adagn = AdaGN(8, time_dim=6, latent_dim=5, scale_offset=offset)
    h, time, latent = torch.randn(2, 8, 4, 4), torch.randn(2, 6), torch.randn(2, 5)
    t_s, t_b = adagn.time_proj(time)[:, :8], adagn.time_proj(time)[:, 8:]
    z_s, z_b = adagn.latent_proj(latent)[:, :8], adagn.latent_proj(latent)[:, 8:]
    groups = h.view(2, 2, 4 * 4 * 4)  # 8 channels form 2 groups of 4
    normed = (
        (groups - groups.mean(2, keepdim=True)) / (groups.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    ).view_as(h)
    for n in range(2):
        for c in range(8):
            by_time = (offset + t_s[n, c]) * normed[n, c] + t_b[n, c]
            expected = (offset + z_s[n, c]) * by_time + z_b[n, c]
            torch.testing.assert_close(adagn(h, time, latent)[n, c], expected)


@pytest.mark.parametrize("num_head_channels", [None, 4])
def test_self_attention_against_torchs(num_head_channels: int | None) -> None:
    torch.manual_seed(0)
    ours, heads = SelfAttention(8, num_head_channels, rescale_residual=False), 1 if num_head_channels is None else 2
    torch.nn.init.normal_(ours.proj.weight)
    theirs = torch.nn.MultiheadAttention(8, heads, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight[:, :, 0, 0],
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight[:, :, 0, 0],
            "out_proj.bias": ours.proj.bias,
        }
    )
    x = torch.randn(2, 8, 3, 3)
    tokens = F.group_norm(x, 2).flatten(2).transpose(1, 2)
    attended = theirs(tokens, tokens, tokens)[0].transpose(1, 2).view_as(x)
    torch.testing.assert_close(ours(x), x + attended)


@pytest.mark.parametrize("num_head_channels", [None, 4])
def test_cross_attention_against_torchs(num_head_channels: int | None) -> None:
    torch.manual_seed(0)
    heads = 1 if num_head_channels is None else 2
    for rescale in (False, True):
        ours = CrossAttention(8, 6, num_head_channels, rescale_residual=rescale)
        for parameter in ours.parameters():
            torch.nn.init.normal_(parameter)
        theirs = torch.nn.MultiheadAttention(8, heads, kdim=6, vdim=6, batch_first=True)
        key, value = ours.key_value.weight.chunk(2)
        theirs.load_state_dict(
            {
                "q_proj_weight": ours.query.weight[:, :, 0, 0],
                "k_proj_weight": key,
                "v_proj_weight": value,
                "in_proj_bias": torch.cat([ours.state_dict()[f"{name}.bias"] for name in ("query", "key_value")]),
                "out_proj.weight": ours.proj.weight[:, :, 0, 0],
                "out_proj.bias": ours.proj.bias,
            }
        )
        x, tokens = torch.randn(2, 8, 3, 3), 3 + 2 * torch.randn(2, 5, 6)
        pixels = F.group_norm(x, 2, ours.norm.weight, ours.norm.bias).flatten(2).transpose(1, 2)
        seen = F.layer_norm(tokens, (6,), ours.norm_tokens.weight, ours.norm_tokens.bias)
        attended = theirs(pixels, seen, seen)[0].transpose(1, 2).view_as(x)
        torch.testing.assert_close(ours(x, tokens), (x + attended) / (2**0.5 if rescale else 1), rtol=1e-4, atol=1e-4)


def unet(weights: dict[str, torch.Tensor], x_t: torch.Tensor, timesteps: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Returns the prediction of a decoder with two levels of one block, from its weights; attention has one head."""

    def conv(h: torch.Tensor, name: str, **settings: int) -> torch.Tensor:
        return F.conv2d(h, weights[f"{name}.weight"], weights[f"{name}.bias"], **settings)

    def linear(h: torch.Tensor, name: str) -> torch.Tensor:
        return h @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(h: torch.Tensor, name: str) -> torch.Tensor:
        return F.group_norm(h, math.gcd(32, h.shape[1] // 4), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def silu(h: torch.Tensor) -> torch.Tensor:
        return h * h.sigmoid()

    def stage(h: torch.Tensor, name: str) -> torch.Tensor:
        block, attention = f"{name}.block", f"{name}.attention"
        skip = conv(h, f"{block}.skip") if f"{block}.skip.weight" in weights else h
        h = norm(conv(silu(norm(h, f"{block}.norm")), f"{block}.conv1", padding=1), f"{block}.adagn.norm")
        for given, projection in ((time, "time_proj"), (latent, "latent_proj")):
            scale, shift = linear(given, f"{block}.adagn.{projection}")[:, :, None, None].chunk(2, dim=1)
            h = (1 + scale) * h + shift
        h = skip + conv(silu(h), f"{block}.conv2", padding=1)
        if f"{attention}.proj.weight" not in weights:
            return h
        q, k, v = conv(norm(h, f"{attention}.norm"), f"{attention}.qkv").flatten(2).chunk(3, dim=1)  # (N, C, H W) each
        shares = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(dim=-1)
        return h + conv((v @ shares.transpose(1, 2)).view_as(h), f"{attention}.proj")

    half = len(weights["time_mlp.0.weight"][0]) // 2
    angles = timesteps[:, None] / 10_000 ** (torch.arange(half) / half)
    embedded = torch.cat([angles.cos(), angles.sin()], dim=1).to(x_t)
    time = silu(linear(silu(linear(embedded, "time_mlp.0")), "time_mlp.2"))
    latent = silu(z)

    skips = [conv(x_t, "conv_in", padding=1)]
    skips.append(stage(skips[-1], "down.0"))
    skips.append(conv(skips[-1], "down.1", stride=2, padding=1))
    skips.append(stage(skips[-1], "down.2"))
    h = stage(stage(skips[-1], "middle.0"), "middle.1")
    for name in ("up.0", "up.1"):
        h = stage(torch.cat([h, skips.pop()], dim=1), name)
    h = conv(h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), "up.2", padding=1)
    for name in ("up.3", "up.4"):
        h = stage(torch.cat([h, skips.pop()], dim=1), name)
    return conv(silu(norm(h, "norm_out")), "conv_out", padding=1)


def test_the_decoder_is_the_unet_that_is_described() -> None:
    """The prediction is that of a UNet written from its weights. In training, dropout changes it."""
    torch.manual_seed(0)
    decoder = UNetDecoder(
        image_size=8,
        latent_dim=5,
        model_channels=8,
        channel_mult=[1, 2],
        num_res_blocks=1,
        attn_resolutions=[4],
        num_head_channels=None,
        dropout=0.5,
    ).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    given = torch.randn(3, 3, 8, 8), torch.tensor([0, 40, 999]), torch.randn(3, 5)
    with torch.no_grad():
        found, expected = decoder(*given), unet(decoder.state_dict(), *given)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.std().item())
        assert not torch.allclose(decoder.train()(*given), found, rtol=0.1)
    assert [group_norm(channels).num_groups for channels in (8, 12, 128, 256)] == [2, 1, 32, 32]


@pytest.mark.parametrize(
    ("channel_mult", "num_res_blocks", "attn_resolutions"), [([1], 1, []), ([1, 2], 1, [8]), ([1, 1, 3], 3, [16, 4])]
)
def test_decoder_takes_any_depth(channel_mult: list[int], num_res_blocks: int, attn_resolutions: list[int]) -> None:
    decoder = UNetDecoder(
        image_size=16,
        latent_dim=5,
        model_channels=8,
        channel_mult=channel_mult,
        num_res_blocks=num_res_blocks,
        attn_resolutions=attn_resolutions,
        num_head_channels=4,
        dropout=0.0,
    )
    attending = sum(isinstance(module, SelfAttention) for module in decoder.modules())
    levels = [16 // 2**level for level in range(len(channel_mult))]
    assert attending == 1 + sum((2 * num_res_blocks + 1) * (level in attn_resolutions) for level in levels)
    x = torch.randn(2, 3, 16, 16)
    eps = decoder(x, torch.tensor([0, 999]), torch.randn(2, 5))
    assert eps.shape == x.shape
    assert eps.eq(0).all(), "the last convolution starts at zero"


def test_dropped_latent_makes_the_output_independent_of_the_source(tiny_soda: SODA) -> None:
    x_t, timesteps = torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 500, 999])
    drop_mask = torch.tensor([True, False, True, False])
    first, second = (
        tiny_soda(torch.randn(4, 1, 3, 8, 8), x_t, timesteps, drop_mask[:, None]).prediction for _ in range(2)
    )
    assert torch.equal(first[drop_mask], second[drop_mask])
    assert not torch.isclose(first[~drop_mask], second[~drop_mask]).all(dim=(1, 2, 3)).any()
    null = tiny_soda.decoder(x_t, timesteps, torch.zeros(4, 8))
    torch.testing.assert_close(first[drop_mask], null[drop_mask])


def test_z_is_the_mean_of_the_latents_of_the_source_views(tiny_soda: SODA) -> None:
    x_source = torch.randn(4, 3, 3, 8, 8)
    expected = sum(tiny_soda.encoder(view) for view in x_source.unbind(dim=1)) / 3
    torch.testing.assert_close(tiny_soda.encode(x_source), expected)
    args = torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 500, 999])
    eps = tiny_soda(x_source, *args, torch.zeros(4, 1, dtype=torch.bool)).prediction
    torch.testing.assert_close(eps, tiny_soda.decoder(*args, expected))


def test_within_three_steps_every_parameter_has_had_a_gradient() -> None:
    torch.manual_seed(0)
    encoder = {"architecture": "resnet18", "stem": "small", "width": 8, "latent_dim": 8}
    decoder = {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8]}
    soda = build_soda(8, encoder, {**decoder, "num_head_channels": None, "dropout": 0.0})
    optimizer = torch.optim.AdamW(soda.parameters(), lr=1e-3)
    waiting = {name for name, _ in soda.named_parameters()}
    for _ in range(3):
        x_source, x_t, noise = torch.randn(3, 8, 3, 8, 8).unbind()
        eps = soda(x_source[:, None], x_t, torch.randint(1000, (8,)), torch.zeros(8, 1, dtype=torch.bool)).prediction
        (eps - noise).square().mean().backward()
        waiting -= {name for name, p in soda.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert not waiting


def test_state_dict_loads_into_a_copy(tiny_soda: SODA) -> None:
    other = copy.deepcopy(tiny_soda)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(tiny_soda.state_dict())
    args = torch.randn(2, 1, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([[False], [True]])
    assert torch.equal(other(*args).prediction, tiny_soda(*args).prediction)


def test_every_encoder_keeps_the_contract() -> None:
    """Each name in the config has an encoder, and the outputs z and pooled have the declared widths."""
    assert list(ENCODERS) == list(get_args(Architecture))
    for make in dict.fromkeys(ENCODERS.values()):
        name = next(name for name, value in ENCODERS.items() if value is make)
        encoder = make(architecture=name, stem="small", width=8, latent_dim=6).eval()
        found = encoder.features(torch.randn(2, 3, 64, 64))
        assert found["z"].shape == (2, encoder.latent_dim) and found["pooled"].shape == (2, encoder.pooled_dim)
        assert torch.equal(encoder(torch.ones(1, 3, 64, 64)), encoder.features(torch.ones(1, 3, 64, 64))["z"])


@pytest.mark.parametrize(
    ("architecture", "stem"), [("resnet18", "small"), ("resnet18", "imagenet"), ("wide_resnet28_1", "small")]
)
@pytest.mark.parametrize("image_size", [8, 17, 33, 64])
def test_sizes_are_those_of_the_modules(architecture: Architecture, stem: Stem, image_size: int) -> None:
    encoder = ENCODERS[architecture](architecture=architecture, stem=stem, width=4, latent_dim=4).eval()
    seen: list[int] = []
    last = [m for m in encoder.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2) and m.kernel_size == (3, 3)]
    last[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    encoder(torch.zeros(1, 3, image_size, image_size))
    assert seen == [last_strided_input(image_size, architecture, stem)]


@pytest.mark.parametrize(("channel_mult", "num_res_blocks"), [([1], 1), ([1, 2, 2], 2)])
def test_counts_are_those_of_the_decoder(channel_mult: list[int], num_res_blocks: int) -> None:
    decoder = UNetDecoder(
        image_size=16,
        latent_dim=16,
        model_channels=8,
        channel_mult=channel_mult,
        num_res_blocks=num_res_blocks,
        attn_resolutions=[],
        num_head_channels=None,
        dropout=0.0,
        modulation="sectioned",
    )
    levels = len(channel_mult)
    assert len(decoder.section_dims) == num_sections("sectioned", levels, num_res_blocks)
    for part in ("down", "middle", "up"):
        assert len(getattr(decoder, part)) == num_decoder_modules(part, levels, num_res_blocks)
    assert sorted({layer.resolution for layer in decoder.layers()}, reverse=True) == resolutions(16, levels)
