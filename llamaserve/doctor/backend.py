"""Whether llama.cpp was compiled for what this machine has: its GPU and its processor's features."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from enum import Enum

from llamaserve.doctor.case import Case
from llamaserve.doctor.findings import Finding, command, gigabytes, note, ok, one_after_the_other, problem, warning
from llamaserve.doctor.llama import Build, NoAnswer, read_build
from llamaserve.doctor.machine import Machine

_NATIVE = "-DGGML_NATIVE=on"
_CUDA, _VULKAN, _METAL = "-DGGML_CUDA=on", "-DGGML_VULKAN=on", "-DGGML_METAL=on"
_NVCC = "usr/local/cuda/bin/nvcc"
_DISCRETE = 3e9  # bytes of its own memory; what shares the processor's has less, or none
_HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")

# llama.cpp's name of a feature: the kernel's names of what a processor must have for it.
_FEATURES = {
    "AVX": ("avx",),
    "AVX2": ("avx2",),
    "F16C": ("f16c",),
    "FMA": ("fma",),
    "AVX_VNNI": ("avx_vnni",),
    "AVX512": ("avx512f",),
    "AVX512_VNNI": ("avx512_vnni",),
    "AVX512_BF16": ("avx512_bf16",),
    "AMX_INT8": ("amx_int8",),
    "NEON": ("asimd", "neon"),
    "DOTPROD": ("asimddp",),
    "MATMUL_INT8": ("i8mm",),
    "FP16_VA": ("asimdhp",),
}
_ESSENTIAL = frozenset(("AVX", "AVX2", "F16C", "FMA", "NEON", "DOTPROD"))  # without them it is several times slower
_MAC_FEATURES = {
    "asimd": "hw.optional.AdvSIMD",
    "asimddp": "hw.optional.arm.FEAT_DotProd",
    "i8mm": "hw.optional.arm.FEAT_I8MM",
    "asimdhp": "hw.optional.arm.FEAT_FP16",
}
_GPU_FLAGS = {"CUDA": _CUDA, "VULKAN": _VULKAN, "METAL": _METAL, "MTL": _METAL, "ROCM": "-DGGML_HIP=on"}


class Maker(Enum):
    """Who made a GPU, with the number that PCI devices bear."""

    NVIDIA = "0x10de"
    AMD = "0x1002"
    INTEL = "0x8086"


def backend(case: Case, read: Callable[[], Build] = read_build) -> Iterator[Finding]:
    """Examine llama.cpp's build. ``read`` asks it."""
    yield from _rosetta(case)
    try:
        build = read()
    except NoAnswer as error:
        yield _no_answer(case, error)
        return
    names = sorted(build.features & _FEATURES.keys())
    yield ok("llama.cpp", f"{_kind(build)}; compiled for {', '.join(names) or 'any processor'}")
    yield from _processor(case, build)
    yield from _gpu(case, build)


def _kind(build: Build) -> str:
    found = [name for name in build.backends if name != "CPU"]
    return " and ".join(found) or ("for GPUs" if build.gpu else "CPU only")


def _rosetta(case: Case) -> Iterator[Finding]:
    machine = case.machine
    if machine.is_mac and (machine.sysctl("sysctl.proc_translated") == "1" or _is_emulated(machine)):
        checkout = case.installation.checkout
        brew = "/opt/homebrew/bin/brew install python@3.12"
        words = ("PYTHON=/opt/homebrew/bin/python3.12",)
        make = command("make", "-C", checkout, "clean", "install", *words) if checkout is not None else None
        yield problem(
            "Rosetta",
            "this Python is for Intel processors and runs emulated: without Metal, and many times slower",
            one_after_the_other(brew, make),
        )


def _is_emulated(machine: Machine) -> bool:
    return machine.processor == "x86_64" and machine.sysctl("hw.optional.arm64") == "1"


def _no_answer(case: Case, error: NoAnswer) -> Finding:
    said = str(error)
    fix = case.installation.rebuild(case.machine, (_NATIVE,))
    if error.crash == signal.SIGILL:
        return problem("llama.cpp", "it is compiled for another processor, and crashes on this one", fix)
    if "libgomp" in said:
        return problem("llama.cpp", f"it {said}", case.machine.install("openmp") or fix)
    if "No module named 'llama_cpp'" in said:
        return problem("llama.cpp", "llama-cpp-python is not installed", case.installation.install_all())
    return problem("llama.cpp", f"it does not start; its process {said}", fix)


# ---- the processor -----------------------------------------------------------------------------------------------


def _processor(case: Case, build: Build) -> Iterator[Finding]:
    has = processor_flags(case.machine)
    if not has:
        return
    able = {name for name, flags in _FEATURES.items() if has & set(flags)}
    if lacking := sorted((build.features & _FEATURES.keys()) - able):
        yield problem(
            "processor",
            f"llama.cpp is compiled for {', '.join(lacking)}, which this processor has not: loading a model may crash",
            case.installation.rebuild(case.machine, _flags(build, _NATIVE)),
        )
    unused = sorted(able - build.features)
    slow = [name for name in unused if name in _ESSENTIAL]
    if unused:
        finding = warning if slow else note
        cost = "which makes it several times slower" if slow else "which would make prompts faster"
        yield finding(
            "processor",
            f"it has {', '.join(unused)}, and llama.cpp is compiled without, {cost}",
            case.installation.rebuild(case.machine, _flags(build, _NATIVE)),
        )
    elif not lacking:
        yield ok("processor", "all of its features that matter are used")


def processor_flags(machine: Machine) -> set[str]:
    """Return the features of the processor by Linux's names; empty where they are not known."""
    if machine.is_mac:
        told = f"{machine.sysctl('machdep.cpu.features') or ''} {machine.sysctl('machdep.cpu.leaf7_features') or ''}"
        flags = set(told.lower().replace("avx1.0", "avx").split())
        return flags | {flag for flag, name in _MAC_FEATURES.items() if machine.sysctl(name) == "1"}
    for line in (machine.read("proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def _flags(build: Build, *more: str) -> list[str]:
    """Return what llama.cpp must be compiled with to keep its backends, and with what else."""
    words = [name.upper() for name in (*build.backends, *(device.name for device in build.devices))]
    kept = [flag for name, flag in _GPU_FLAGS.items() if any(word.startswith(name) for word in words)]
    return list(dict.fromkeys((*kept, *more)))


# ---- the GPU -----------------------------------------------------------------------------------------------------


def _gpu(case: Case, build: Build) -> Iterator[Finding]:
    for device in build.devices:
        memory = f"{gigabytes(device.free)} of {gigabytes(device.total)} free"
        yield ok("GPU", f"{device.name}, {device.description}: {memory}")
    if build.devices:
        return
    if case.machine.is_mac:
        yield from _metal(case, build)
        return
    hidden = [name for name in _HIDING if case.machine.environment.get(name, "all").strip() in ("", "-1")]
    if build.gpu and hidden:
        yield note("GPU", f"{hidden[0]} hides all GPUs from llama.cpp", command("unset", *hidden))
        return
    makers = gpu_makers(case.machine)
    if not makers:
        yield ok("GPU", "there is none; models run on the processor")
    for maker, discrete in makers.items():
        yield _unused(case, build, maker, discrete=discrete)


def _metal(case: Case, build: Build) -> Iterator[Finding]:
    if case.machine.processor != "arm64":
        yield ok("GPU", "none that llama.cpp is fast on; models run on the processor")
    elif not build.gpu:
        fix = case.installation.rebuild(case.machine, (_METAL,))
        yield warning("GPU", "llama.cpp is compiled without Metal, so this Mac's GPU is not used", fix)
    else:
        yield warning("GPU", "llama.cpp is compiled with Metal and finds no GPU", "system_profiler SPDisplaysDataType")


def gpu_makers(machine: Machine) -> dict[Maker, bool]:
    """Return who made this machine's GPUs, and whether they have a memory of their own."""
    found: dict[Maker, bool] = {}
    for folder in machine.matching("sys/bus/pci/devices/*"):
        if not (machine.read(f"{folder}/class") or "").startswith("0x03"):
            continue
        vendor = machine.read(f"{folder}/vendor")
        for maker in Maker:
            if vendor == maker.value:
                found[maker] = found.get(maker, False) or _is_discrete(machine, maker, str(folder))
    if machine.exists("proc/driver/nvidia/version") or _nvidia_elsewhere(machine):
        found[Maker.NVIDIA] = True
    return dict(sorted(found.items(), key=lambda item: not item[1]))


def _is_discrete(machine: Machine, maker: Maker, folder: str) -> bool:
    match maker:
        case Maker.NVIDIA:
            return True
        case Maker.AMD:
            return int(machine.read(f"{folder}/mem_info_vram_total") or 0) > _DISCRETE
        case Maker.INTEL:
            return not folder.rpartition("/")[2].startswith("0000:00:")  # where processors have their own


def _nvidia_elsewhere(machine: Machine) -> bool:
    """Tell whether there is an NVIDIA GPU that is no PCI device: under Windows, or in a Jetson."""
    return machine.exists("usr/lib/wsl/lib/libcuda.so.1") or "tegra" in (
        machine.read("proc/device-tree/compatible") or ""
    )


def _unused(case: Case, build: Build, maker: Maker, *, discrete: bool) -> Finding:
    """Say why llama.cpp does not use a GPU that is there."""
    machine = case.machine
    if maker is Maker.NVIDIA and (finding := _nvidia_out_of_reach(machine)) is not None:
        return finding
    if build.gpu:
        return _out_of_reach(machine, maker)
    name = {Maker.NVIDIA: "NVIDIA", Maker.AMD: "AMD", Maker.INTEL: "Intel"}[maker]
    needed, flags = _wanted(machine, maker)
    fix = one_after_the_other(needed, case.installation.rebuild(machine, flags))
    if not discrete:
        return note("GPU", f"an {name} GPU shares the processor's memory; using it may or may not be faster", fix)
    return warning("GPU", f"there is an {name} GPU, and llama.cpp is compiled without a backend for it", fix)


def _wanted(machine: Machine, maker: Maker) -> tuple[str | None, Sequence[str]]:
    """Return the command that installs what a backend needs to be compiled, and what it is compiled with."""
    if maker is Maker.NVIDIA:
        if machine.find("nvcc"):
            return None, (_CUDA,)
        if machine.exists(_NVCC):
            return None, (_CUDA, f"-DCMAKE_CUDA_COMPILER={machine.root / _NVCC}")
        if toolkit := machine.install("cuda"):
            return toolkit, (_CUDA,)
    return (None if machine.find("glslc") else machine.install("vulkan")), (_VULKAN,)


def _nvidia_out_of_reach(machine: Machine) -> Finding | None:
    if _nvidia_elsewhere(machine) or machine.exists("dev/nvidiactl"):
        return None
    if machine.in_container:
        message = "this machine has an NVIDIA GPU that the container has no access to; it needs the option --gpus all"
        return note("GPU", message, "docker run --rm --gpus all ubuntu nvidia-smi")
    if machine.exists("proc/driver/nvidia/version"):
        fix = one_after_the_other(machine.as_root("nvidia-modprobe -c 0 -u"), "nvidia-smi")
        return warning("GPU", "the NVIDIA driver is loaded, and /dev/nvidiactl is not there", fix)
    ubuntu = machine.as_root("ubuntu-drivers install") if machine.find("ubuntu-drivers") else None
    fix = ubuntu or machine.install("nvidia driver") or "lspci -k -d 10de:"
    return warning("GPU", "there is an NVIDIA GPU, and its driver is not loaded", fix)


def _out_of_reach(machine: Machine, maker: Maker) -> Finding:
    """Say why a build for GPUs finds none."""
    nodes = [machine.root / path for path in (*machine.matching("dev/dri/renderD*"), *machine.matching("dev/kfd"))]
    locked = [node for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    if locked and maker is not Maker.NVIDIA:
        user = machine.environment.get("USER", "root")
        fix = machine.as_root(command("usermod", "-aG", "render,video", user))
        return problem("GPU", f"this user may not use {locked[0]}; log in again after the command", fix)
    tool = "nvidia-smi" if maker is Maker.NVIDIA else "vulkaninfo --summary"
    return warning("GPU", "llama.cpp is compiled for GPUs, and finds none that its backend can use", tool)
