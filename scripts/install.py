"""Make ``.venv`` ready to run llamaserve, unless it is already. Needs nothing but Python's standard library.

Called by the Makefile. The first install compiles llama.cpp, which takes minutes; this says so and shows that it goes
on. From the environment: ``WHEELS`` takes ready-made binaries from llama-cpp-python's own index instead of compiling
(cpu, metal, cu124, vulkan, ...), and ``CMAKE_ARGS`` are passed to the compilation (``-DGGML_CUDA=on``).

What speech needs is taken from wheels only. Where these can't be had, all else is installed, and each later call tries
again to get them. What images need has to be compiled, and is installed only where it is asked for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "llamaserve-install.json"
BINDING = "llama-cpp-python"
WHEEL_INDEX = "https://abetlen.github.io/llama-cpp-python/whl/"
METAL = "-DGGML_METAL=on"
BACKENDS = ("METAL", "CUDA", "VULKAN", "OPENCL", "SYCL", "MUSA")
SPEECH = "speech"  # the extra that may be left out
IMAGES = "images"  # the one that is compiled, too
IMAGE_BINDING = "stable-diffusion-cpp-python"
IMPATIENT = ("--retries", "0")  # pip's options where what is wanted may wait for another day
HEARTBEAT = 20  # seconds


def cmake_args(environment: Mapping[str, str], system: str, machine: str) -> str:
    """Return what llama.cpp is compiled with: the user's choice, else Metal on Apple Silicon."""
    if "CMAKE_ARGS" in environment:
        return environment["CMAKE_ARGS"]
    return METAL if (system, machine) == ("Darwin", "arm64") else ""


def wanted_binding(environment: Mapping[str, str], system: str, machine: str) -> tuple[str, str]:
    """Return the ready-made wheels and the compilation's arguments: what is asked for, else what is installed."""
    if environment.get("WHEELS"):
        return environment["WHEELS"], ""
    found = last_install()
    if found and "CMAKE_ARGS" not in environment:
        return found.get("wheels", ""), found.get("cmake_args", "")
    return "", cmake_args(environment, system, machine)


def make_environment() -> None:
    """Make the virtual environment, also where an earlier attempt left half of one."""
    if importlib.util.find_spec("ensurepip") is None:
        raise SystemExit("error: this Python can't make virtual environments\ntry:   sudo apt install python3-venv")
    python = VENV / "bin" / "python"
    if python.exists() and subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    say(f"making a virtual environment in {VENV}")
    venv.create(VENV, with_pip=True, clear=True)


def binding_options(wheels: str, arguments: str) -> list[str]:
    """Return pip's options that decide where the llama.cpp binding comes from."""
    if wheels:
        return ["--extra-index-url", WHEEL_INDEX + wheels, "--only-binary", BINDING]
    if arguments:  # pip would reuse a wheel that was compiled with other arguments
        return ["--no-binary", BINDING, "--no-cache-dir"]
    return []


def image_arguments(arguments: str) -> str:
    """Return what stable-diffusion.cpp is compiled with, given what llama.cpp is: it has other names for backends."""
    words = {"GGML_HIP": "SD_HIPBLAS"} | {f"GGML_{name}": f"SD_{name}" for name in BACKENDS}
    return re.sub(r"-D ?(GGML_\w+)", lambda found: f"-D{words.get(found[1].upper(), found[1])}", arguments)


def fingerprint(extras: Sequence[str], wheels: str, arguments: str) -> dict[str, str]:
    """Return what an install depends on; as long as it is the same, there is nothing to do."""
    project = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    return {
        "project": project,
        "extras": ",".join(sorted(extras)),
        "wheels": wheels,
        "cmake_args": arguments,
        "root": str(ROOT),
        "python": platform.python_version(),
    }


def last_install() -> dict[str, str]:
    """Return what the last install depended on; empty when there was none."""
    try:
        return dict(json.loads(STAMP.read_text()))
    except (OSError, ValueError):
        return {}


def is_ready(wanted: Mapping[str, str]) -> bool:
    """Tell whether the last install covers what is wanted; extras that are already there do no harm."""
    found = last_install()
    if not extras_of(wanted) <= extras_of(found):
        return False
    return all(found.get(key) == value for key, value in wanted.items() if key != "extras")


def has_images() -> bool:
    """Tell whether what images need is there, in whatever version and however it got there."""
    return any(VENV.glob(f"lib/python*/site-packages/{IMAGE_BINDING.replace('-', '_')}-*.dist-info"))


def extras_of(notes: Mapping[str, str]) -> set[str]:
    """Return the extras that an install has, or shall have."""
    return set(filter(None, notes.get("extras", "").split(",")))


def is_other_binding(wanted: Mapping[str, str]) -> bool:
    """Tell whether the installed binding was made another way, so that pip would wrongly take it for good."""
    found = last_install()
    return any(found.get(key, wanted[key]) != wanted[key] for key in ("wheels", "cmake_args"))


def check_compiler(wheels: str) -> None:
    """Stop with advice when llama.cpp has to be compiled and there is no compiler."""
    if wheels or any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return
    advice = "xcode-select --install" if sys.platform == "darwin" else "sudo apt install build-essential"
    raise SystemExit(
        f"error: llama.cpp has to be compiled, and there is no C++ compiler\n"
        f"try:   {advice}\n"
        f"or:    make run WHEELS=cpu        (ready-made binaries from {WHEEL_INDEX})"
    )


def run_visibly(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command, say every while that it still goes on, and return its exit status."""
    start, done = time.monotonic(), threading.Event()

    def heartbeat() -> None:
        while not done.wait(HEARTBEAT):
            minutes, seconds = divmod(int(time.monotonic() - start), 60)
            say(f"... still installing after {minutes} min {seconds:02} s")

    thread = threading.Thread(target=heartbeat, daemon=True)
    thread.start()
    try:
        return subprocess.run(command, env=dict(environment), check=False).returncode
    finally:
        done.set()
        thread.join()


def run_or_stop(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a command visibly; what it could not do ends the installation."""
    if code := run_visibly(command, environment):
        raise SystemExit(f"error: the installation failed (pip's exit status {code}); its last lines above say why")


def packages_of(extra: str) -> list[str]:
    """Return the packages of an extra, as pip takes them."""
    import tomllib  # here, since a Python that is too old for it still has to be told so

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return list(project["optional-dependencies"][extra])


def add_speech(pip: Sequence[str], packages: Sequence[str]) -> bool:
    """Install what speech needs, and tell whether that went well. If not, say how to try again: all else works."""
    if run_visibly([*pip, "install", "--only-binary", ":all:", *packages], os.environ) == 0:
        return True
    again = shlex.join([pip[0], "-m", "pip", "install", *packages])
    say(
        "what speech needs could not be installed, as pip says above; all else is installed\n"
        "The next `make run` tries again. Where there are no ready-made packages, pip may compile them:\n"
        f"try:   {again}"
    )
    return False


def add_images(pip: Sequence[str], packages: Sequence[str], arguments: str) -> None:
    """Install what images need, compiled with other ``arguments`` than the last time if these are others."""
    check_compiler("")
    say("installing what images need; stable-diffusion.cpp is compiled, which takes 2 to 15 minutes the first time")
    options = ["--no-binary", IMAGE_BINDING, "--no-cache-dir"] if arguments else []
    run_or_stop([*pip, "install", *options, *packages], {**os.environ, "CMAKE_ARGS": arguments})


def install_all_else(pip: Sequence[str], wanted: Mapping[str, str]) -> None:
    """Install llamaserve without what speech and images need, and note what this install depends on."""
    wheels, arguments = wanted["wheels"], wanted["cmake_args"]
    check_compiler(wheels)
    replace = is_other_binding(wanted)
    make_environment()
    if not wheels:
        say("installing; the first time llama.cpp is compiled, which takes 3 to 15 minutes (later installs reuse it)")
    if replace:
        run_or_stop([*pip, "uninstall", "--yes", BINDING, IMAGE_BINDING], os.environ)
    STAMP.unlink(missing_ok=True)  # from here on, until the end, nothing is ready
    environment = {**os.environ, "CMAKE_ARGS": arguments} if arguments else os.environ
    project = ["--editable", f"{ROOT}[{wanted['extras']}]"]
    run_or_stop([*pip, "install", *binding_options(wheels, arguments), *project], environment)
    STAMP.write_text(json.dumps(wanted))


def say(line: str) -> None:
    """Tell the user something at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main(extras: Sequence[str]) -> None:
    """Install llamaserve with these extras into the virtual environment."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this script also has to run where the package can't
        raise SystemExit(f"error: Python 3.11 or newer is needed, this is {platform.python_version()}")
    wheels, arguments = wanted_binding(os.environ, platform.system(), platform.machine())
    if has_images():  # who has them wants them in the version of today, too
        extras = [*extras, IMAGES]
    wanted = fingerprint(sorted({*extras}), wheels, arguments)
    if is_ready(wanted):
        return
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    all_else = fingerprint([extra for extra in extras if extra not in (SPEECH, IMAGES)], wheels, arguments)
    again: Sequence[str] = ()
    if is_ready(all_else):
        again = IMPATIENT
    else:
        install_all_else(pip, all_else)
    missing = extras_of(wanted) - extras_of(last_install())
    complete = True
    if SPEECH in missing:
        if again:
            say("what speech needs is not there yet; installing it")
        if complete := add_speech([*pip, *again], packages_of(SPEECH)):
            note(wanted, SPEECH)
    if IMAGES in missing:
        add_images(pip, packages_of(IMAGES), image_arguments(arguments or os.environ.get("CMAKE_ARGS", "")))
        note(wanted, IMAGES)
    if complete:
        say("installed")


def note(wanted: Mapping[str, str], extra: str) -> None:
    """Note that an extra is there, too."""
    have = extras_of(last_install()) | {extra}
    STAMP.write_text(json.dumps({**wanted, "extras": ",".join(sorted(have))}))


if __name__ == "__main__":
    main(sys.argv[1:])
