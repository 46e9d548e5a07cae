"""Judges a text with a guard model: renders its questions, has them answered, and reads the answers.

Knows nothing of HTTP, of how a template is rendered or of how a model runs: the two are functions that it is given.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice

from llamaserve.errors import ModelNotCapable
from llamaserve.moderation.guards import Family, Question, Verdict
from llamaserve.moderation.spelling import plain
from llamaserve.moderation.words import NextTokens

# Returns the prompt for a message of the user's, with variables for the chat template, and whether that asks for an
# answer.
Render = Callable[[str, dict[str, object], bool], Awaitable[str]]
# Returns, for each of the prompts, how probable which next tokens are.
Ask = Callable[[Sequence[str]], Awaitable[Sequence[NextTokens]]]

# Control tokens, and the tags between which the templates put a text.
_TAG = re.compile(
    r"<(?=\|[^|<>\s]{1,40}\|>|(BEGIN|END) [A-Z ]{1,40}>|/?(s|bos|eos|pad|unk|think|score|guardian)>"
    r"|(start|end)_of_(turn|text|role|image|risk_definition)>)",
    re.IGNORECASE,
)
# The beginning of a line that says who speaks, in the templates' words. Marks may be around: Markdown's, brackets.
_SPEAKER = re.compile(
    r"(?:_|[^\w>])*+(?:user|agent|assistant|human|chatbot)(?:\s++(?:message|question|response))?"
    r"(?:_|[^\w:\u02d0\u2236\ua789\ufe13\ufe30\ufe55\uff1a])*+[:\u02d0\u2236\ua789\ufe13\ufe30\ufe55\uff1a]",
    re.IGNORECASE,
)


async def judge(text: str, family: Family, render: Render, ask: Ask) -> Verdict:
    """Return what a guard model says of a text. Raises what ``render`` and ``ask`` raise; ``ModelNotCapable`` when the
    chat template leaves the text out; ``EngineError`` when the model answers with nothing that it was asked for.

    The first question is asked alone, so that the others find its prompt evaluated as far as they begin like it; and
    those are not rendered before it is answered.
    """
    text = defused(text)
    first, *others = family.method.questions
    answers = [await ask(await _prompts(text, first, family, render))]
    prompts = [await _prompts(text, question, family, render) for question in others]
    rest = iter(await ask([prompt for some in prompts for prompt in some]))
    answers += [list(islice(rest, len(some))) for some in prompts]
    return family.method.read(answers)


async def _prompts(text: str, question: Question, family: Family, render: Render) -> list[str]:
    """Return the prompts of one question: one for each place at which the model is asked."""
    prompt = await render(text, dict(question.variables), family.generation_prompt)
    if text.strip() not in prompt:
        raise ModelNotCapable(f"the model's chat template, taken for that of {family.title}, leaves out what is judged")
    prompt = prompt.lstrip()  # a space before the begin token would be a token
    if family.lead is not None:
        prompt = prompt.rstrip("\n") + family.lead
    return [prompt + question.begin + stem for stem in question.words.asked_behind]


def defused(text: str) -> str:
    """Return a text in which nothing is read as a control token, or as the end of what is judged: it could go on with a
    verdict of its own. A space parts what would be. Lines that name a speaker become quoted ones.
    """
    lines = _TAG.sub("< ", text).splitlines(keepends=True)
    return "".join(f"> {line}" if _SPEAKER.match(plain(line)) else line for line in lines)
