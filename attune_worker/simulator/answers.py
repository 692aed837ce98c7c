"""What does the simulated model say? Something plausible that follows from the prompt and nothing else.

Every answer ends with a digest of the prompt it answers, so that a test can check that the right
answer came back to the right question.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

Turn = tuple[str, str]
"""One message: its role and its text."""

BYTES_PER_TOKEN = 4
LEAD_SENTENCES = 2
LEAD_CHARACTERS = 400

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class ModelAnswer(NamedTuple):
    """``finish_reason``: ``stop``, ``length``, or ``stop_sequence`` with the sequence that was met."""

    text: str
    finish_reason: str
    stop_sequence: str | None = None


def count_tokens(text: str) -> int:
    """Return how many tokens the simulator counts in ``text``.

    The simulator has a tokenizer of its own, a quarter of the UTF-8 bytes rounded up: exact, cheap,
    and easy to recount by hand. It agrees with no real model's.
    """
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def count_prompt_tokens(system: str, messages: Sequence[Turn]) -> int:
    """Return the input tokens of a call: the system prompt and every message, each rounded up by itself."""
    return count_tokens(system) + sum(count_tokens(text) for _, text in messages)


def prompt_digest(prompt: str | Sequence[Turn], system: str = "") -> str:
    """Return the twelve hex digits that the answer to this prompt ends with."""
    turns: Sequence[Turn] = [("user", prompt)] if isinstance(prompt, str) else prompt
    digest = hashlib.blake2b(system.encode(), digest_size=6)
    for role, text in turns:
        digest.update(f"\0{role}\0{text}".encode())
    return digest.hexdigest()


def answer(
    model: str, system: str, messages: Sequence[Turn], max_tokens: int | None = None, stop: Sequence[str] = ()
) -> ModelAnswer:
    """Return what ``model`` says to this conversation, always the same for the same arguments.

    A stop sequence ends the text before it; then ``max_tokens``, counted by ``count_tokens``, cuts it.
    """
    text = f"{_lead(messages)} [{model} on {prompt_digest(messages, system)}]"
    text, met = _stop_before(text, stop)
    if max_tokens is not None and count_tokens(text) > max_tokens:
        return ModelAnswer(_cut(text, max_tokens), "length")
    return ModelAnswer(text, "stop_sequence" if met else "stop", met)


def _lead(messages: Sequence[Turn]) -> str:
    """Return the first sentences of the last user message, as a lazy summariser would."""
    question = next((text for role, text in reversed(messages) if role == "user"), "")
    sentences = _SENTENCE_END.split(question[:LEAD_CHARACTERS].strip(), maxsplit=LEAD_SENTENCES)
    return " ".join(sentences[:LEAD_SENTENCES])


def _stop_before(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    found = [(place, sequence) for sequence in stop if (place := text.find(sequence)) >= 0]
    if not found:
        return text, None
    place, sequence = min(found)
    return text[:place], sequence


def _cut(text: str, max_tokens: int) -> str:
    # A character that straddles the limit is dropped whole, so the text stays valid UTF-8.
    return text.encode()[: max_tokens * BYTES_PER_TOKEN].decode(errors="ignore")
