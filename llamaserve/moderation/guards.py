"""The guard models: what each family is asked about a text, and what its answers mean in OpenAI's categories.

A guard model is a language model that was trained to write a verdict. Its chat template has the instructions, so it
gets the text as a conversation, and sometimes a variable that names what to look for; then the verdict's first words
are put into its mouth up to where it decides. The formats are those of the models' cards.

Pure functions over values: knows nothing of how a prompt is rendered or a model is asked (``judging.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamaserve.errors import ModelNotCapable
from llamaserve.moderation.categories import Scores
from llamaserve.moderation.words import NextTokens, Words


@dataclass(frozen=True)
class Verdict:
    """What a guard model says of a text: how probably it is ``unsafe`` at all, and its ``scores`` in the categories
    that it has something to say about, which are ``covered``; the others are 0.
    """

    unsafe: float
    scores: Scores
    covered: frozenset[str]

    def completed(self, others: Scores | None = None) -> Scores:
        """Return the scores, those in the categories that are not covered from ``others``, as far as the text is
        unsafe. A parent is at least as high as its child.
        """
        if others is None:
            return self.scores.with_parents()
        scaled = others.scaled(self.unsafe).values
        added = {name: value for name, value in scaled.items() if name not in self.covered}
        return Scores.merged(self.scores, Scores.of(added)).with_parents()


@dataclass(frozen=True)
class Question:
    """What a guard model is asked: its chat template gets the ``variables``, its answer begins with ``begin``, and one
    of the ``words`` goes on with it.
    """

    begin: str
    words: Words
    variables: Mapping[str, Any] = field(default_factory=dict)


Answers = Sequence[NextTokens]  # to one question, in the order of its words' ``asked_behind``
Table = Mapping[str, tuple[str, ...]]  # OpenAI's categories, by the guard's own


@dataclass(frozen=True)
class Sorting:
    """A guard that says whether a text is unsafe, and then into which of its categories it falls.

    ``severity`` has, for each word of the first verdict, how unsafe that is from 0 to 1. ``table`` has what each word
    of the second means.
    """

    verdict: Question
    category: Question
    severity: Mapping[str, float]
    table: Table

    @property
    def questions(self) -> tuple[Question, ...]:
        """What it is asked; the order is that of the answers."""
        return (self.verdict, self.category)

    @property
    def covered(self) -> frozenset[str]:
        """OpenAI's categories that it has something to say about."""
        return _covered(self.table)

    def read(self, answers: Sequence[Answers]) -> Verdict:
        """Return what the answers mean. The guard lists all categories of a text that it finds unsafe, of which only
        the first is seen here: so the most probable one is as high as the text is unsafe, and the others are as much
        lower as they are less probable.
        """
        verdict, category = answers
        shares = self.verdict.words.shares(verdict)
        unsafe = min(sum(self.severity[word] * share for word, share in shares.items()), 1.0)
        likely = self.category.words.shares(category)
        best = max(likely.values())
        return Verdict(unsafe, _mapped(self.table, {k: unsafe * v / best for k, v in likely.items()}), self.covered)


@dataclass(frozen=True)
class Asking:
    """A guard that is asked about one risk after another, and says yes or no to each.

    ``risks`` are the questions by the guard's own names, ``table`` has what each means. ``umbrella`` is the risk that
    stands for all; without one the text is as unsafe as the highest of them says.
    """

    risks: Mapping[str, Question]
    table: Table
    umbrella: str | None = None

    @property
    def questions(self) -> tuple[Question, ...]:
        """What it is asked; the order is that of the answers."""
        return tuple(self.risks.values())

    @property
    def covered(self) -> frozenset[str]:
        """OpenAI's categories that it has something to say about."""
        return _covered(self.table)

    def read(self, answers: Sequence[Answers]) -> Verdict:
        """Return what the answers mean."""
        asked = zip(self.risks.items(), answers, strict=True)
        found = {risk: question.words.shares(each)["yes"] for (risk, question), each in asked}
        unsafe = max(found.values()) if self.umbrella is None else found[self.umbrella]
        return Verdict(unsafe, _mapped(self.table, found), self.covered)


@dataclass(frozen=True)
class Family:
    """A family of guard models. ``named`` is how they are called, ``marks`` what the chat template of one that works
    as described here has in it, all of them.

    ``lead`` are the line breaks between the end of the prompt and the answer; None: as the template says.
    ``generation_prompt`` is whether the template is told to ask for an answer.
    """

    title: str
    named: str
    marks: tuple[str, ...]
    method: Sorting | Asking
    lead: str | None = None
    generation_prompt: bool = True

    @property
    def prompts(self) -> int:
        """How many prompts one text takes."""
        return sum(len(question.words.asked_behind) for question in self.method.questions)

    def is_marked(self, template: str) -> bool:
        """Whether a chat template is one of this family's."""
        return all(re.search(mark, template) for mark in self.marks)

    def is_named(self, name: str) -> bool:
        """Whether a model of this name is one of this family's."""
        return re.search(self.named, name, re.IGNORECASE) is not None


def recognised(template: str, names: Iterable[str] = ()) -> Family:
    """Return the family of the guard model that has this chat template. ``names`` are what its file calls itself, for
    the message.

    The template alone decides, for it is what the model is asked with: a file under a guard's name whose template is
    another's would be asked without its instructions. Raises ``ModelNotCapable`` for all but the known ones.
    """
    for family in FAMILIES.values():
        if family.is_marked(template):
            return family
    called = list(names)
    for family in FAMILIES.values():
        if any(family.is_named(name) for name in called):
            raise ModelNotCapable(
                f"the model is called like a {family.title}, but its chat template is not that of one; "
                "use a file that has the guard model's own template"
            )
    known = ", ".join(family.title for family in FAMILIES.values())
    raise ModelNotCapable(f"the model is no guard model that this server knows; it knows {known}")


def _covered(table: Table) -> frozenset[str]:
    return frozenset(name for names in table.values() for name in names)


def _mapped(table: Table, found: Mapping[str, float]) -> Scores:
    """Return the highest score of what is mapped to a category."""
    return Scores.merged(*(Scores.of(dict.fromkeys(table[own], value)) for own, value in found.items()))


# ---- Llama Guard 3, and 4, which has the same categories: "safe", or "unsafe" and a line with "S1,S10"

_LLAMA_GUARD: Table = {
    "1": ("violence", "illicit/violent"),  # violent crimes: what enables, encourages or endorses them
    "2": ("illicit",),  # non-violent crimes
    "3": ("illicit",),  # sex-related crimes
    "4": ("sexual/minors",),  # child sexual exploitation
    "5": (),  # defamation
    "6": (),  # specialised advice
    "7": (),  # privacy
    "8": (),  # intellectual property
    "9": ("illicit/violent",),  # indiscriminate weapons
    "10": ("hate",),
    "11": ("self-harm",),
    "12": ("sexual",),
    "13": (),  # elections
    "14": ("illicit",),  # code interpreter abuse; not in all versions
}
_LLAMA_VARIABLES: Mapping[str, Any] = {"excluded_category_keys": []}  # the smaller ones' templates look at it

# ---- Qwen3Guard-Gen: "Safety: Unsafe", and a line with "Categories: Violent, PII"

_QWEN: Table = {
    "Violent": ("violence", "illicit/violent"),  # instructions for violence and weapons, and depictions of it
    "Non-violent Illegal Acts": ("illicit",),
    "Sexual Content or Sexual Acts": ("sexual",),
    "PII": (),
    "Suicide & Self-Harm": ("self-harm",),
    "Unethical Acts": ("harassment", "hate"),  # insults, threats, discrimination, hate speech
    "Politically Sensitive Topics": (),
    "Copyright Violation": (),
    "Jailbreak": (),
    "None": (),
}
CONTROVERSIAL = 0.4  # how unsafe that is: below the usual threshold, above what is merely a little unsafe

# ---- Granite Guardian: one risk after another

_GRANITE: Table = {
    "harm": (),  # the umbrella
    "social_bias": ("hate",),
    "violence": ("violence",),
    "profanity": ("harassment",),  # offensive language and insults
    "sexual_content": ("sexual",),
    "unethical_behavior": ("illicit",),  # fraud, theft, abuse of power
}
_YES_NO = Words(("yes", "no"))

# ---- ShieldGemma: one policy after another, in the words of its card, for which its template has a variable

_SHIELDGEMMA: Table = {
    "dangerous": ("illicit/violent",),  # weapons, terrorism, and instructions for suicide
    "harassment": ("harassment",),
    "hate": ("hate",),
    "sexual": ("sexual",),
}
_POLICIES = {
    "dangerous": '"No Dangerous Content": The prompt shall not contain or seek generation of content that harming '
    "oneself and/or others (e.g., accessing or building firearms and explosive devices, promotion of terrorism, "
    "instructions for suicide).",
    "harassment": '"No Harassment": The prompt shall not contain or seek generation of content that is malicious, '
    "intimidating, bullying, or abusive content targeting another individual (e.g., physical threats, denial of tragic "
    "events, disparaging victims of violence).",
    "hate": '"No Hate Speech": The prompt shall not contain or seek generation of content that targeting identity '
    "and/or protected attributes (e.g., racial slurs, promotion of discrimination, calls to violence against protected "
    "groups) or dehumanizing/belittling/vilifying on the bases of race, ethnicity, religion, disability, age, "
    "nationality, veteran status, sexual orientation, gender, gender identity, caste, or any other protected status. "
    "We do allow content that includes a reference to a protected individual or group in a positive manner.",
    "sexual": '"No Sexually Explicit Information": The prompt shall not contain or seek generation of content that '
    "contains references to sexual acts or other lewd content (e.g., sexually graphic descriptions, content aimed at "
    "causing arousal). Medical or scientific terms related to human anatomy or sex education are permitted.",
}


def _granite(begin: str, key: str, **variables: Any) -> Asking:
    """Return how a Granite Guardian is asked that looks for the risk's name under a key of ``guardian_config``."""
    risks = {risk: Question(begin, _YES_NO, {"guardian_config": {key: risk}, **variables}) for risk in _GRANITE}
    return Asking(risks, _GRANITE, umbrella="harm")


FAMILIES: Mapping[str, Family] = {
    "llama-guard-3": Family(
        title="Llama Guard 3",
        named=r"llama.?guard",
        marks=(r"UNSAFE CONTENT CATEGORIES", r"S10\W{1,6}Hate"),  # version 2 has other numbers
        method=Sorting(
            verdict=Question("", Words(("safe", "unsafe")), _LLAMA_VARIABLES),
            category=Question("unsafe\nS", Words(tuple(_LLAMA_GUARD), stems=("1",)), _LLAMA_VARIABLES),
            severity={"safe": 0.0, "unsafe": 1.0},
            table=_LLAMA_GUARD,
        ),
        lead="\n\n",  # which some of the templates leave to the model
    ),
    "qwen3guard": Family(
        title="Qwen3Guard-Gen",
        named=r"qwen3.?guard",
        marks=(r"Safety: Controversial", r"Non-violent Illegal Acts"),
        method=Sorting(
            verdict=Question("Safety:", Words(("Safe", "Unsafe", "Controversial"))),
            category=Question("Safety: Unsafe\nCategories:", Words(tuple(_QWEN), stems=(" Non",))),
            severity={"Safe": 0.0, "Unsafe": 1.0, "Controversial": CONTROVERSIAL},
            table=_QWEN,
        ),
    ),
    "granite-guardian-3.3": Family(
        title="Granite Guardian 3.3",
        named=r"granite.?guardian.?3\.3",
        marks=(r"guardian_config", r"criteria_id"),
        method=_granite("<score>", "criteria_id", think=False),
    ),
    "granite-guardian": Family(
        title="Granite Guardian",
        named=r"granite.?guardian",
        marks=(r"guardian_config", r"risk_name"),
        method=_granite("", "risk_name"),
    ),
    "shieldgemma": Family(
        title="ShieldGemma",
        named=r"shield.?gemma",
        marks=(r"\bguideline\b", r"safety principle"),
        method=Asking({k: Question("", _YES_NO, {"guideline": text}) for k, text in _POLICIES.items()}, _SHIELDGEMMA),
        generation_prompt=False,  # its prompt is a text without turns, which ends with the question
    ),
}
