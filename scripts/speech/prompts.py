"""The prompts of a telephone exchange, as Debian's packages of Asterisk's core sounds have them: spoken by one voice in
each language, with transcripts, at 8,000 samples a second.

Knows where a package has what, and which prompts are spoken sentences; not what is done with them.
"""

from __future__ import annotations

import gzip
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SEED = "prompts"
_PACKAGES = ("asterisk-core-sounds-{}", "asterisk-core-sounds-{}-wav")
_TRANSCRIPTS = "usr/share/doc/asterisk-core-sounds-{0}/core-sounds-{0}.txt.gz"
_SOUNDS = "usr/share/asterisk/sounds"
_FEWEST_WORDS = 3
_NEEDED = (
    "the prompts come from Debian's packages {}; where there is no apt, unpack them with `dpkg -x` and name the folder "
    "with --sounds"
)

_DESCRIPTION = re.compile(r"[\[\](){}<>]")  # of a sound, or of what is said
_DAMAGE = re.compile(r"\w\?\w|\?\s*[a-z,.]|\ufffd")  # a question mark that ends no sentence stands for a lost letter


class NotThere(Exception):
    """The packages can't be had; the text says why."""


@dataclass(frozen=True)
class Prompt:
    """A recording and what is said in it."""

    name: str
    file: Path
    text: str


def fetch(language: str, folder: Path) -> None:
    """Unpack a language's packages into a folder, unless they are there. Raises ``NotThere``."""
    packages = [package.format(language) for package in _PACKAGES]
    if (folder / _TRANSCRIPTS.format(language)).exists() and _voices(language, folder):
        return
    if missing := [program for program in ("apt-get", "dpkg") if shutil.which(program) is None]:
        raise NotThere(f"there is no {missing[0]} here: {_NEEDED.format(' and '.join(packages))}")
    folder.mkdir(parents=True, exist_ok=True)
    _run(["apt-get", "download", *packages], folder)
    for package in packages:
        for file in folder.glob(f"{package}_*.deb"):
            _run(["dpkg", "-x", str(file), str(folder)], folder)
            file.unlink()


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise NotThere(f"{' '.join(command[:2])} failed: {words[0]}")


def _voices(language: str, folder: Path) -> list[Path]:
    return sorted((folder / _SOUNDS).glob(f"{language}_*"))


def read(language: str, folder: Path) -> list[Prompt]:
    """Return all prompts of a language that are spoken sentences. Raises ``NotThere``."""
    transcripts, voices = folder / _TRANSCRIPTS.format(language), _voices(language, folder)
    if not transcripts.exists() or not voices:
        raise NotThere(f"{folder} has no prompts in {language}: {_NEEDED.format(_PACKAGES[0].format(language))}")
    lines = gzip.decompress(transcripts.read_bytes()).decode("utf-8-sig", "replace").splitlines()
    found = []
    for line in lines:
        name, separator, text = line.partition(": ")
        file = voices[0] / f"{name}.wav"
        if separator and not line.startswith(";") and file.is_file() and is_sentence(text):
            found.append(Prompt(name, file, text.strip()))
    return found


def is_sentence(text: str) -> bool:
    """Tell whether a transcript has some words and nothing else, and no letter of it is lost."""
    if _DESCRIPTION.search(text) or _DAMAGE.search(text):
        return False
    return len(re.findall(r"\w\S+", text)) >= _FEWEST_WORDS  # single letters, which are spelled, are none


def chosen(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return so many prompts in the order of their names, always the same ones."""
    draw = random.Random(SEED)  # noqa: S311
    ordered = sorted(prompts, key=lambda prompt: prompt.name)
    return sorted(draw.sample(ordered, min(count, len(ordered))), key=lambda prompt: prompt.name)
