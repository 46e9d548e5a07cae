"""What was evaluated before is found again in the settings as they come, also after other requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from running_server import RunningServer

_SUBJECTS = ("foxes", "bridges", "bread", "the moon")


@pytest.fixture(scope="module")
def sdk(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    models = tmp_path_factory.mktemp("prefixes") / "models.yaml"
    models.write_text(f"models:\n  starter: {{source: 'file:{starter_model}', context: 2048}}\n")
    with (
        RunningServer("serve", "starter", "--models-file", str(models)) as running,
        openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as sdk,
    ):
        yield sdk


def test_conversations_by_turns_evaluate_only_what_is_new(sdk: openai.OpenAI) -> None:
    """Each one leaves the cache for the next, and comes back."""
    system = "You are a patient teacher. " * 60  # more than a block of what all have in common
    conversations: dict[str, list[Any]] = {
        subject: [{"role": "system", "content": system}, {"role": "user", "content": f"What are {subject}?"}]
        for subject in _SUBJECTS
    }
    known: dict[str, int] = {}
    shared = 0
    for turn in range(3):
        for subject, messages in conversations.items():
            answer = sdk.chat.completions.create(model="starter", messages=messages, max_tokens=24, temperature=0)
            usage = answer.usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            cached = usage.prompt_tokens_details.cached_tokens or 0
            if turn == 0 and subject != _SUBJECTS[0]:
                assert cached > 256, "the system prompt"
                shared = cached
            elif turn:
                assert cached >= known[subject] - 1 > shared, "all that was said before"
            known[subject] = usage.prompt_tokens
            messages += [
                {"role": "assistant", "content": answer.choices[0].message.content},
                {"role": "user", "content": "Tell me more."},
            ]
