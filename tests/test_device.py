"""Tests of the choice of device, number format, backend, compilation and threads. GPUs are faked."""

import os
import subprocess
import sys

import pytest
import torch

from config.errors import ConfigError
from config.reading import load_config
from experiment.models import build_on_meta, prefers_channels_last, to_device
from experiment.shares import check_batch_size
from tests.conftest import ROOT, small_soda
from utils import device as module
from utils.cli import run
from utils.device import choose_amp_dtype, choose_compile, choose_device
from utils.distributed import collectives
from utils.distributed.processes import check_launcher, rank, world_size


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that seems to have two GPUs and NCCL."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)


def be_process(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    """Sets the environment variables of a launcher for one of `world_size` processes on this machine."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(rank))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(world_size))


def test_without_cuda_another_device_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu") and caplog.text == ""
    assert choose_device("cuda") == torch.device("cpu")
    assert "device=cuda is not available here: using cpu" in caplog.text


def test_each_process_has_its_gpu(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose_device("auto") == torch.device("cuda", 0) and choose_device("cpu") == torch.device("cpu")
    be_process(monkeypatch, 1, 2)
    assert choose_device("auto") == torch.device("cuda", 1) and caplog.text == ""


def test_more_processes_than_gpus_share_them(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    be_process(monkeypatch, 3, 4)
    assert choose_device("cuda") == torch.device("cuda", 1)
    assert "4 processes share 2 GPU(s)" in caplog.text


@pytest.mark.parametrize(
    ("processes", "kind", "asked", "taken", "said"),
    [
        (2, "cuda", "auto", "nccl", ""),
        (2, "cuda", "gloo", "gloo", ""),
        (4, "cuda", "auto", "gloo", ""),
        (4, "cuda", "nccl", "gloo", "needs one GPU per process: using gloo instead"),
        (2, "cpu", "auto", "gloo", ""),
        (2, "cpu", "nccl", "gloo", "needs one GPU per process: using gloo instead"),
    ],
)
def test_the_backend_is_what_the_gpus_allow(
    two_gpus: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    processes: int,
    kind: str,
    asked: str,
    taken: str,
    said: str,
) -> None:
    be_process(monkeypatch, 0, processes)
    opened: list[str] = []
    monkeypatch.setattr(collectives, "all_gather_object", lambda value: [value] * processes)
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend, timeout: opened.append(backend))
    monkeypatch.setattr(collectives, "_tensor_group", None)
    collectives.open_tensor_group(asked, torch.device(kind))
    assert opened == [taken] and said in caplog.text and (said or not caplog.text)


@pytest.mark.parametrize(
    ("kind", "computes_bf16", "expected", "said"),
    [
        ("cuda", True, torch.bfloat16, ""),
        ("cuda", False, torch.float16, "mixed precision is fp16"),
        ("cpu", True, torch.bfloat16, ""),
        ("cpu", False, None, "using float32"),
        ("mps", True, None, "using float32"),
    ],
)
def test_mixed_precision_is_what_the_hardware_computes(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    computes_bf16: bool,
    expected: torch.dtype | None,
    said: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: computes_bf16)
    monkeypatch.setattr(module, "_cpu_computes_bf16", lambda: computes_bf16)
    assert choose_amp_dtype(True, torch.device(kind)) == expected
    assert said in caplog.text and (said or not caplog.text)
    assert choose_amp_dtype(False, torch.device(kind)) is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "MASTER_ADDR or MASTER_PORT is missing: start several processes with torchrun",
        ),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "invalid launcher variables RANK=x WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "invalid launcher variables"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "invalid launcher variables"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, "invalid launcher variables"),
    ],
)
def test_an_environment_that_no_launcher_made_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: dict[str, str], expected: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        run(lambda: pytest.fail("the program must not start"))
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and expected in printed


def test_variables_that_clusters_set_for_themselves_are_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """WORLD_SIZE without RANK, which some clusters set, comes from no launcher: the program is a single process."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    check_launcher()
    assert (rank(), world_size()) == (0, 1)


@pytest.mark.parametrize(
    ("setting", "kind", "compiler", "expected"),
    [
        (None, "cpu", "c++", False),
        (None, "cuda", "c++", True),
        (False, "cuda", "c++", False),
        (True, "cpu", "c++", True),
        (True, "cpu", None, False),
        (None, "cuda", None, False),
    ],
)
def test_the_model_is_compiled_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    setting: bool | None,
    kind: str,
    compiler: str | None,
    expected: bool,
) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(module.Path, "exists", lambda path: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_compile(setting, torch.device(kind)) == expected
    wanted = setting or (setting is None and kind == "cuda")
    assert ("training without torch.compile" in caplog.text) == (wanted and not expected)


@pytest.mark.parametrize(("policy", "expected"), [(None, "passive"), ("active", "active")])
def test_threads_wait_passively_unless_the_user_decides(policy: str | None, expected: str) -> None:
    """OMP_WAIT_POLICY is set before torch is imported, because OpenMP reads it then."""
    code = "import os, sys; from utils.cli import run\n"
    code += "run(lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules) or 0)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if policy is None else {"OMP_WAIT_POLICY": policy}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{expected} False\n", done.stderr


@pytest.mark.parametrize(
    ("device", "capability", "width", "expected"),
    [
        ("cuda", "AVX2", 4, True),
        ("mps", "DEFAULT", 64, False),
        ("cpu", "AVX512", 64, False),
        ("cpu", "AVX2", 64, True),
        ("cpu", "AVX2", 8, True),
        ("cpu", "AVX2", 4, False),  # a kernel of torch 2.14 writes past its memory
    ],
)
def test_the_memory_layout_is_the_fastest_that_works(
    device: str, capability: str, width: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    soda = build_on_meta(load_config(ROOT / "config" / "cifar10.yaml", [f"encoder.width={width}"]))
    assert prefers_channels_last(soda, torch.device(device)) == expected


def test_both_memory_layouts_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of a model do not depend on the layout that `to_device` chooses."""
    generator = torch.Generator().manual_seed(0)
    x_source, x_t, noise = torch.randn(3, 4, 3, 8, 8, generator=generator).unbind()
    found = []
    for capability, last in (("AVX512", False), ("AVX2", True)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        soda = to_device(small_soda(width=8).train(), torch.device("cpu"))
        weights = [weight for weight in soda.encoder.parameters() if weight.dim() == 4 and weight.shape[-1] == 3]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) == last for weight in weights) and weights
        eps = soda(
            x_source[:, None], x_t, torch.tensor([0, 10, 500, 999]), torch.zeros(4, 1, dtype=torch.bool)
        ).prediction
        (eps - noise).square().mean().backward()
        found.append({"eps": eps.detach()} | {name: p.grad for name, p in soda.named_parameters()})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
        assert expected.abs().max() > 0, name


def test_a_blank_name_of_a_compiler_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(module.shutil, "which", lambda name: asked.append(name))
    for blank in (True, False):
        monkeypatch.setenv("CXX", " ") if blank else monkeypatch.delenv("CXX", raising=False)
        choose_compile(True, torch.device("cpu"))
    assert len(asked) == 2 and asked[0] == asked[1].strip() != ""


@pytest.mark.parametrize("multiple", [1, 4])
def test_batch_sizes_are_suggested_that_the_config_accepts(monkeypatch: pytest.MonkeyPatch, multiple: int) -> None:
    monkeypatch.setattr("experiment.shares.world_size", lambda: 3)
    with pytest.raises(ConfigError, match=r"is 100, but for 3 processes .* a multiple of 12: use 96 or 108$"):
        check_batch_size(100, multiple)
    check_batch_size(96, multiple)
