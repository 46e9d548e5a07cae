"""llama.cpp's build against the machine: GPUs, processor features, and a library that does not start."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_machine import about, bad, case_of, checked, described, installed, one

from llamaserve.doctor.backend import backend
from llamaserve.doctor.case import Case
from llamaserve.doctor.findings import Finding, Level
from llamaserve.doctor.llama import Build, NoAnswer, Question, read_build, read_vocabulary
from llamaserve.engine.events import Device
from llamaserve.settings import Settings

FLAGS = "fpu avx avx2 fma f16c"
CPUINFO = {"proc/cpuinfo": f"processor\t: 0\nflags\t\t: {FLAGS}\nbugs\t\t: x\n"}
INFO = "CPU : AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | OPENMP = 1 | "
CPU_ONLY = Build(False, INFO, [])
NVIDIA = {"sys/bus/pci/devices/0000:01:00.0/class": "0x030000", "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de"}
DRIVEN = {**NVIDIA, "proc/driver/nvidia/version": "NVRM version", "dev/nvidiactl": ""}
PIP = "/opt/venv/bin/python -m pip install --force-reinstall --no-cache-dir --no-deps --no-binary llama-cpp-python"


def findings(case: Case, build: Build | NoAnswer = CPU_ONLY) -> list[Finding]:
    def read() -> Build:
        if isinstance(build, NoAnswer):
            raise build
        return build

    return checked(backend(case, read))


def test_the_real_build_is_described() -> None:
    build = read_build()
    assert "CPU" in build.backends
    assert build.features
    assert checked(backend(Case(Settings())))[0].subject in ("llama.cpp", "Rosetta")


def test_a_plain_machine_is_well(tmp_path: Path) -> None:
    found = findings(case_of(described(tmp_path, CPUINFO)))
    assert not bad(found)
    assert one(found, "llama.cpp").message == "CPU only; compiled for AVX, AVX2, F16C, FMA"
    assert one(found, "GPU").message == "there is none; models run on the processor"


def test_a_gpu_in_use_is_shown(tmp_path: Path) -> None:
    build = Build(True, "CUDA : ARCHS = 900 | " + INFO, [Device("CUDA0", "NVIDIA H100", 70 * 10**9, 80 * 10**9)])
    found = findings(case_of(described(tmp_path, {**CPUINFO, **DRIVEN})), build)
    assert not bad(found)
    assert one(found, "GPU").message == "CUDA0, NVIDIA H100: 70.0 GB of 80.0 GB free"


def test_an_nvidia_gpu_wants_a_build_with_cuda(tmp_path: Path) -> None:
    machine = described(tmp_path, {**CPUINFO, **DRIVEN}, found=("g++", "nvcc"))
    finding = one(findings(case_of(machine)), "GPU")
    assert finding.level is Level.WARNING
    assert finding.fix is not None
    assert finding.fix.startswith(f"CMAKE_ARGS=-DGGML_CUDA=on {PIP} llama-cpp-python==")


def test_the_cuda_compiler_is_found_outside_the_path_or_installed(tmp_path: Path) -> None:
    toolkit = {"usr/local/cuda/bin/nvcc": ""}
    fix = one(findings(case_of(described(tmp_path / "a", {**CPUINFO, **DRIVEN, **toolkit}))), "GPU").fix
    assert fix is not None
    assert f"-DCMAKE_CUDA_COMPILER={tmp_path}/a/usr/local/cuda/bin/nvcc" in fix
    fix = one(findings(case_of(described(tmp_path / "b", {**CPUINFO, **DRIVEN}))), "GPU").fix
    assert fix is not None
    assert fix.startswith("sudo apt-get update && sudo apt-get install -y nvidia-cuda-toolkit && CMAKE_ARGS=")


def test_without_packages_for_cuda_vulkan_is_proposed(tmp_path: Path) -> None:
    policy = {"apt-cache policy nvidia-cuda-toolkit": "nvidia-cuda-toolkit:\n  Candidate: (none)"}
    fix = one(findings(case_of(described(tmp_path, {**CPUINFO, **DRIVEN}, policy))), "GPU").fix
    assert fix is not None
    assert "libvulkan-dev glslc && CMAKE_ARGS=-DGGML_VULKAN=on" in fix


def test_a_compiler_is_installed_first(tmp_path: Path) -> None:
    machine = described(tmp_path, {**CPUINFO, **DRIVEN}, found=("nvcc", "dnf"), superuser=True)
    fix = one(findings(case_of(machine)), "GPU").fix
    assert fix is not None
    assert fix.startswith("dnf install -y gcc-c++ make && CMAKE_ARGS=-DGGML_CUDA=on ")


def test_in_a_checkout_make_does_it_and_pip_what_make_takes_for_done(tmp_path: Path) -> None:
    checkout, prefix = tmp_path / "my checkout", tmp_path / "my checkout" / ".venv"
    prefix.mkdir(parents=True)
    (checkout / "pyproject.toml").write_text('[project]\ndependencies = ["llama-cpp-python==0.3.36"]\n')
    (prefix / "llamaserve-install.json").write_text('{"cmake_args": "-DGGML_METAL=on"}')
    machine = described(tmp_path / "root", {**CPUINFO, **DRIVEN}, found=("g++", "nvcc"))
    installation = replace(installed(prefix), checkout=checkout)
    case = replace(case_of(machine), installation=installation)
    assert one(findings(case), "GPU").fix == f"make -C '{checkout}' install CMAKE_ARGS=-DGGML_CUDA=on"
    (prefix / "llamaserve-install.json").write_text('{"cmake_args": "-DGGML_CUDA=on"}')
    fix = one(findings(case), "GPU").fix
    assert fix is not None
    assert fix.endswith("--no-binary llama-cpp-python llama-cpp-python==0.3.36")


def test_uv_installs_where_there_is_no_pip(tmp_path: Path) -> None:
    machine = described(tmp_path, {**CPUINFO, **DRIVEN}, found=("g++", "nvcc"))
    case = replace(case_of(machine), installation=installed(Path("/opt/venv"), has_pip=False))
    fix = one(findings(case), "GPU").fix
    assert fix is not None
    assert fix.startswith("CMAKE_ARGS=-DGGML_CUDA=on uv pip install --python /opt/venv/bin/python --reinstall")


def test_an_nvidia_gpu_without_its_driver(tmp_path: Path) -> None:
    finding = one(findings(case_of(described(tmp_path / "a", {**CPUINFO, **NVIDIA}))), "GPU")
    assert finding.message == "there is an NVIDIA GPU, and its driver is not loaded"
    assert finding.fix == "sudo apt-get update && sudo apt-get install -y nvidia-driver"
    machine = described(tmp_path / "b", {**CPUINFO, **NVIDIA}, found=("apt-get", "ubuntu-drivers"))
    assert one(findings(case_of(machine)), "GPU").fix == "sudo ubuntu-drivers install"


def test_a_container_needs_to_be_given_the_gpu(tmp_path: Path) -> None:
    files = {**CPUINFO, **NVIDIA, "proc/driver/nvidia/version": "x", ".dockerenv": ""}
    finding = one(findings(case_of(described(tmp_path, files))), "GPU")
    assert finding.level is Level.NOTE
    assert finding.fix == "docker run --rm --gpus all ubuntu nvidia-smi"


@pytest.mark.parametrize(
    "files", [{"usr/lib/wsl/lib/libcuda.so.1": ""}, {"proc/device-tree/compatible": "nvidia,p3768\0nvidia,tegra234"}]
)
def test_nvidia_gpus_under_windows_and_in_jetsons_are_found(files: dict[str, str], tmp_path: Path) -> None:
    finding = one(findings(case_of(described(tmp_path, {**CPUINFO, **files}, found=("nvcc", "g++")))), "GPU")
    assert finding.fix is not None
    assert finding.fix.startswith("CMAKE_ARGS=-DGGML_CUDA=on ")


@pytest.mark.parametrize(
    ("slot", "vendor", "memory", "level"),
    [
        ("0000:03:00.0", "0x1002", "17163091968", Level.WARNING),
        ("0000:0a:00.0", "0x1002", "536870912", Level.NOTE),
        ("0000:00:02.0", "0x8086", "", Level.NOTE),
        ("0000:03:00.0", "0x8086", "", Level.WARNING),
    ],
)
def test_amd_and_intel_gpus_want_vulkan(slot: str, vendor: str, memory: str, level: Level, tmp_path: Path) -> None:
    folder = f"sys/bus/pci/devices/{slot}"
    files = {f"{folder}/class": "0x030000", f"{folder}/vendor": vendor, f"{folder}/mem_info_vram_total": memory}
    finding = one(findings(case_of(described(tmp_path, {**CPUINFO, **files}))), "GPU")
    assert finding.level is level
    assert finding.fix is not None
    assert "install -y libvulkan-dev glslc && CMAKE_ARGS=-DGGML_VULKAN=on " in finding.fix


def test_other_pci_devices_of_the_same_makers_are_no_gpus(tmp_path: Path) -> None:
    folder = "sys/bus/pci/devices/0000:00:1f.0"
    machine = described(tmp_path, {**CPUINFO, f"{folder}/class": "0x060100", f"{folder}/vendor": "0x8086"})
    assert not bad(findings(case_of(machine)))


def test_a_build_for_gpus_that_finds_none(tmp_path: Path) -> None:
    build = Build(True, INFO, [])
    machine = described(tmp_path / "a", {**CPUINFO, **DRIVEN})
    assert one(findings(case_of(machine), build), "GPU").fix == "nvidia-smi"
    hidden = described(tmp_path / "b", {**CPUINFO, **DRIVEN}, CUDA_VISIBLE_DEVICES="")
    assert one(findings(case_of(hidden), build), "GPU").fix == "unset CUDA_VISIBLE_DEVICES"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_a_gpu_that_the_user_may_not_use(tmp_path: Path) -> None:
    folder = "sys/bus/pci/devices/0000:03:00.0"
    files = {f"{folder}/class": "0x030000", f"{folder}/vendor": "0x1002", "dev/dri/renderD128": ""}
    machine = described(tmp_path, {**CPUINFO, **files}, USER="ann o'nym")
    (tmp_path / "dev/dri/renderD128").chmod(0)
    fix = one(findings(case_of(machine), Build(True, INFO, [])), "GPU").fix
    assert fix == """sudo usermod -aG render,video 'ann o'"'"'nym'"""


def test_a_build_that_leaves_features_unused(tmp_path: Path) -> None:
    slow = Build(True, "CPU : AVX = 1 | ", [Device("Vulkan0", "a GPU", 1, 2)])
    finding = one(findings(case_of(described(tmp_path / "a", CPUINFO)), slow), "processor")
    assert finding.level is Level.WARNING
    assert "it has AVX2, F16C, FMA, and llama.cpp is compiled without" in finding.message
    assert finding.fix is not None
    assert finding.fix.startswith("CMAKE_ARGS='-DGGML_VULKAN=on -DGGML_NATIVE=on' ")
    new = {"proc/cpuinfo": f"flags : {FLAGS} avx512f"}
    assert one(findings(case_of(described(tmp_path / "b", new))), "processor").level is Level.NOTE


def test_a_build_for_features_that_are_not_there(tmp_path: Path) -> None:
    found = findings(case_of(described(tmp_path, {"proc/cpuinfo": "flags : avx"})))
    finding = one(found, "processor")
    assert finding.level is Level.PROBLEM
    assert "AVX2, F16C, FMA, which this processor has not" in finding.message


def test_arm_processors_are_known_by_their_own_names(tmp_path: Path) -> None:
    build = Build(False, "CPU : NEON = 1 | ARM_FMA = 1 | ", [])
    machine = described(tmp_path, {"proc/cpuinfo": "Features\t: fp asimd asimddp i8mm\n"}, processor="aarch64")
    finding = one(findings(case_of(machine), build), "processor")
    assert finding.level is Level.WARNING
    assert "it has DOTPROD, MATMUL_INT8" in finding.message


def mac(root: Path, processor: str = "arm64", **values: str) -> Case:
    told = {f"/usr/sbin/sysctl -n {name.replace('__', '.')}": value for name, value in values.items()}
    return case_of(described(root, programs=told, system="Darwin", processor=processor, found=("clang++",)))


def test_a_mac_wants_metal(tmp_path: Path) -> None:
    build = Build(False, "CPU : NEON = 1 | DOTPROD = 1 | ", [])
    fix = one(findings(mac(tmp_path), build), "GPU").fix
    assert fix is not None
    assert fix.startswith(f"CMAKE_ARGS=-DGGML_METAL=on {PIP}")
    metal = Build(True, "MTL : EMBED_LIBRARY = 1 | CPU : NEON = 1 | ", [Device("MTL0", "Apple M3", 1, 2)])
    assert not bad(findings(mac(tmp_path), metal))


def test_an_emulated_python_on_a_mac_is_a_problem(tmp_path: Path) -> None:
    finding = one(findings(mac(tmp_path, "x86_64", sysctl__proc_translated="1")), "Rosetta")
    assert finding.level is Level.PROBLEM
    assert finding.fix == "/opt/homebrew/bin/brew install python@3.12"
    assert about(findings(mac(tmp_path, "x86_64", hw__optional__arm64="1")), "Rosetta")
    assert not about(findings(mac(tmp_path, "x86_64")), "Rosetta")


@pytest.mark.parametrize(
    ("error", "words", "fix"),
    [
        (NoAnswer("was ended by SIGILL", signal.SIGILL), "another processor", "CMAKE_ARGS=-DGGML_NATIVE=on "),
        (NoAnswer("failed: OSError: libgomp.so.1: cannot open"), "libgomp", "sudo apt-get update && "),
        (NoAnswer("failed: ModuleNotFoundError: No module named 'llama_cpp'"), "not installed", "/opt/venv/bin/python"),
        (NoAnswer("gave no answer within 60 s"), "no answer", "CMAKE_ARGS=-DGGML_NATIVE=on "),
    ],
)
def test_a_llama_cpp_that_does_not_start_is_a_finding(error: NoAnswer, words: str, fix: str, tmp_path: Path) -> None:
    (finding,) = findings(case_of(described(tmp_path, CPUINFO)), error)
    assert finding.level is Level.PROBLEM
    assert words in finding.message
    assert finding.fix is not None
    assert finding.fix.startswith(fix)


def child(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> str:
    (folder / "bad_child.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    return "bad_child"


@pytest.mark.parametrize(
    ("code", "how", "crash"),
    [
        ("import os; os.kill(os.getpid(), 11)", "was ended by SIGSEGV", 11),
        ("import os; os.kill(os.getpid(), 4)", "was ended by SIGILL", 4),
        ("import nothing_of_this_name", "failed: ModuleNotFoundError: No module named 'nothing_of_this_name'", None),
        ("print('not what was asked for')", "answered what can't be read", None),
        ("import time; time.sleep(60)", "gave no answer within 1 s", None),
    ],
)
def test_a_child_that_crashes_or_hangs_is_told_of(
    code: str, how: str, crash: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 1 if "sleep" in code else 60
    with pytest.raises(NoAnswer) as caught:
        read_build(child(tmp_path, code, monkeypatch), limit)
    assert str(caught.value).startswith(how)
    assert caught.value.crash == crash


def test_a_vocabulary_is_read(starter_model: Path) -> None:
    names = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>"]
    read = read_vocabulary(str(starter_model), Question("<|im_start|>user\nHello", "<|im_end|>\n", names))
    assert (read.marker, read.marker_ends, read.begins) == ("<|im_end|>", True, 1)
    assert read.controls == ["<|im_start|>", "<|im_end|>"]
    other = read_vocabulary(str(starter_model), Question("", "\n<|im_start|>", []))
    assert (other.marker, other.marker_ends) == ("<|im_start|>", False)


def test_a_file_without_a_vocabulary_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(NoAnswer, match="can't read the vocabulary"):
        read_vocabulary(str(tmp_path / "none.gguf"), Question("", "", []))
