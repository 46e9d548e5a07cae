"""Measure how well speech is understood: word error rates over the prompts of a telephone exchange, in four languages.

    python scripts/measure_speech.py                      40 prompts of each language
    python scripts/measure_speech.py --only en,fr --count 100
    python scripts/measure_speech.py --sounds FOLDER      packages that are unpacked there, or shall be

The recordings are those of Debian's packages asterisk-core-sounds-XX and asterisk-core-sounds-XX-wav (CC-BY-SA 3.0),
which `apt-get download` fetches into the cache folder; it needs no root. A server is started for them. English prompts
go to a model that knows nothing else, the others to one that has to find out the language, and to translate.

Case, punctuation and accents do not count, "1" is "one" in each language, up to twelve, and "#" is "pound". The exit
status is 1 if a bound of the table is missed: by a language's mean word error rate, by how often the language was found
out, or by the share of English words in translations. Which words are English is known from the English prompts and
from Python's manual; so a translation that is good does not reach 100 %.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics as manual

from benchmark import contenders
from benchmark.client import Unreachable
from benchmark.contenders import HttpServer
from benchmark.hearing import SpeechServer
from benchmark.lab import OURS
from benchmark.models import FoundModel, find_model
from benchmark.processes import StartFailed
from rich.console import Console
from speech.evaluation import LEAST_ENGLISH, LEAST_FOUND, LEAST_GAIN, MOST_ERRORS, Evaluation, attempt
from speech.prompts import NotThere, chosen, fetch, read
from speech.words import LANGUAGES, normalised

from llamaserve.errors import LlamaserveError
from llamaserve.registry.cache import cache_folder

_WORST = 5  # prompts of each language that are shown
_EXAMPLES = 4  # translations likewise
_COLUMNS = ("language", "model", "prompts", "words", "mean WER", "bound", "pooled WER")
_COLUMNS += ("language found", "bound", "English", "bound", "met")


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="LANGUAGES", default=",".join(LANGUAGES), help="default: %(default)s")
    parser.add_argument("--count", type=int, default=40, help="prompts of each language; default: %(default)s")
    parser.add_argument("--sounds", type=Path, metavar="FOLDER", help="where the packages are unpacked")
    parser.add_argument("--english-model", default="whisper-tiny.en", help="default: %(default)s")
    parser.add_argument("--model", default="whisper-base", help="for the other languages; default: %(default)s")
    return parser


def languages(wanted: str) -> list[str]:
    """Return the languages to measure. Raises ``SystemExit`` for one that there is not."""
    found = [each.strip() for each in wanted.split(",")]
    if unknown := [each for each in found if each not in LANGUAGES]:
        raise SystemExit(f"error: no language {', '.join(unknown)}\ntry:   --only {','.join(LANGUAGES)}")
    return found


def english_words(folder: Path) -> frozenset[str]:
    """Return words that are most probably English: those of the English prompts, and of Python's manual."""
    texts = [prompt.text for prompt in read("en", folder)]
    return frozenset(word for text in [*texts, *manual.values()] for word in normalised(text, "en"))


def evaluate(
    language: str, count: int, folder: Path, server: HttpServer, model: str, say: Callable[[str], None]
) -> Evaluation:
    """Have prompts of a language transcribed by a model of the server."""
    speech = SpeechServer(server, model)
    translate = None if language == "en" else lambda audio: speech.transcribe(audio, translate=True)
    prompts = chosen(read(language, folder), count)
    say(f"{language}: {len(prompts)} prompts by {model} ...")
    attempts = [attempt(prompt, language, speech.transcribe, translate) for prompt in prompts]
    return Evaluation(language, model, attempts, english_words(folder))


def tables(evaluations: Sequence[Evaluation]) -> str:
    """Return the error rates, the worst prompts and some translations."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    lines += map(_row, evaluations)
    for each in evaluations:
        lines += ["", f"The worst of {each.language}:"]
        for one in each.worst(_WORST):
            lines += [f"  {one.rate:.2f}  {one.prompt.name}: {one.prompt.text}", f"        heard: {one.heard.text}"]
    for each in evaluations:
        if each.translated:
            lines += ["", f"Translations from {each.language}:"]
        for one in each.translated[:: max(1, len(each.translated) // _EXAMPLES)]:
            lines += [f"  {one.prompt.name}: {one.prompt.text}", f"        {one.translation}"]
    return "\n".join(lines)


def _row(each: Evaluation) -> str:
    count, words = len(each.attempts), sum(len(one.words) for one in each.attempts)
    cells = [each.language, each.model, count, words, f"{each.mean:.3f}", MOST_ERRORS[each.language]]
    cells += [f"{each.pooled:.3f}", f"{each.found} of {count}", f"≥ {LEAST_FOUND:.0%}", *_english(each)]
    cells.append("yes" if each.good else f"NO: {', '.join(each.missed)}")
    return f"| {' | '.join(map(str, cells))} |"


def _english(each: Evaluation) -> tuple[str, str]:
    """Return how English the translations are, and should be; nothing where there need not be any."""
    if each.language == "en":
        return "", ""
    translated, untranslated = each.english(translated=True), each.english(translated=False)
    bound = f"≥ {LEAST_ENGLISH:.0%}, {100 * LEAST_GAIN:.0f} points over untranslated"
    return f"{translated:.1%}; {untranslated:.1%} untranslated", bound


def main() -> None:
    """Fetch, start, measure, print."""
    options = arguments().parse_args()
    wanted, errors, console = languages(options.only), Console(stderr=True), Console()

    def say(line: str) -> None:
        errors.print(line, highlight=False, markup=False, soft_wrap=True)

    folder = (options.sounds or cache_folder() / "benchmark" / "sounds").resolve()
    try:
        for language in {"en", *wanted}:
            fetch(language, folder)
        names = {each: options.english_model if each == "en" else options.model for each in wanted}
        models = {name: find_model(name) for name in names.values()}
        first, *others = models.values()
        more = {model.name: _settings(model) for model in others}
        with contenders.llamaserve(OURS, first.name, _settings(first), more) as server:
            evaluations = [
                evaluate(language, options.count, folder, server, models[names[language]].name, say)
                for language in wanted
            ]
    except (LlamaserveError, NotThere, OSError, StartFailed, Unreachable, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {error}") from None
    console.print(tables(evaluations), highlight=False, markup=False, soft_wrap=True)
    if not all(each.good for each in evaluations):
        raise SystemExit(1)


def _settings(model: FoundModel) -> dict[str, object]:
    return {**model.options, "source": f"file:{model.file}"}


if __name__ == "__main__":
    main()
