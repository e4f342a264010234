"""Which device a process gets, on machines that are made up here."""

from types import SimpleNamespace

import pytest
import torch

from dinov2.utils import environment

ARCHITECTURES = ["sm_75", "sm_80", "sm_90", "compute_90"]


@pytest.fixture
def machine(monkeypatch):
    """Function that makes torch and the system show the given GPUs."""

    def pretend(
        capabilities=(),
        present=None,
        cuda="13.0",
        hip=None,
        nvidia_smi="| CUDA Version: 12.4 |",
        architectures=ARCHITECTURES,
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
        properties = SimpleNamespace(name="Some GPU", total_memory=2**34)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        found = bool(capabilities) if present is None else present
        monkeypatch.setattr(environment, "nvidia_gpu_present", lambda: found)
        monkeypatch.setattr(environment, "_nvidia_smi", lambda *arguments: nvidia_smi)

    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", environment.ALLOW_CPU):
        monkeypatch.delenv(name, raising=False)
    return pretend


def test_machine_without_gpu_trains_on_the_cpu(machine, capsys):
    machine()
    assert environment.select_device() == torch.device("cpu")
    assert environment.main() == 0
    assert "CPU" in capsys.readouterr().out


def test_each_process_gets_its_own_gpu(machine, monkeypatch):
    machine([(9, 0), (9, 0)])
    assert environment.select_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert environment.select_device() == torch.device("cuda", 1)
    assert environment.main() == 0


def test_more_processes_than_gpus_are_refused(machine, monkeypatch):
    machine([(9, 0)])
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(RuntimeError, match=r"LOCAL_RANK 3 .* 1 being visible"):
        environment.select_device()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (dict(cuda=None), r"built without CUDA.*install\.sh"),
        (dict(cuda="13.0"), r"driver supports CUDA 12\.4.*CUDA 13\.0.*update the driver"),
        (dict(nvidia_smi="| CUDA UMD Version: 12.8 |"), r"driver supports CUDA 12\.8"),
        (dict(nvidia_smi=""), "driver does not answer"),
    ],
)
def test_gpu_that_torch_cannot_use_is_refused_with_a_remedy(machine, capsys, state, message):
    machine(present=True, **state)
    with pytest.raises(RuntimeError, match=message):
        environment.select_device()
    assert environment.main() == 1
    assert "update the driver" in (errors := capsys.readouterr().err) or "install.sh" in errors


@pytest.mark.parametrize("capability", [(7, 0), (10, 0)])
def test_gpu_outside_the_build_is_refused(machine, capability):
    machine([capability], architectures=["sm_75", "sm_80", "sm_90"])
    with pytest.raises(RuntimeError, match=rf"sm_{capability[0]}{capability[1]}.*sm_75 sm_80 sm_90 only"):
        environment.select_device()
    assert environment.main() == 1


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_gpu_runs_code_of_its_major_version_and_newer_ones_run_ptx(machine, capability):
    machine([capability])
    assert environment.select_device() == torch.device("cuda", 0)


def test_architecture_names_with_suffixes_do_not_count_as_general_ones(machine):
    machine([(9, 0)], architectures=["sm_90a", "sm_100f"])
    assert environment.gpu_problem() is not None


def test_amd_gpus_are_not_held_against_cuda_architectures(machine):
    machine([(9, 4)], cuda=None, hip="7.0", architectures=["gfx942"])
    assert environment.select_device() == torch.device("cuda", 0)


def test_machine_with_one_usable_gpu_passes_and_names_the_other(machine, capsys):
    machine([(9, 0), (5, 0)])
    assert environment.main() == 0
    printed = capsys.readouterr()
    assert "GPU 1: Some GPU, 16 GiB, not usable" in printed.out
    assert "sm_50" in printed.err


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hiding_the_gpus_chooses_the_cpu(machine, monkeypatch, hidden):
    machine(present=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert environment.select_device() == torch.device("cpu")
    assert environment.main() == 0


def test_cpu_can_be_accepted_in_spite_of_a_gpu(machine, monkeypatch):
    machine(present=True)
    monkeypatch.setenv(environment.ALLOW_CPU, "1")
    assert environment.select_device() == torch.device("cpu")
    assert environment.main() == 0
