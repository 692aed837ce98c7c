"""What the model says follows from the prompt alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attune_worker.simulator import answer, count_prompt_tokens, count_tokens, prompt_digest

TEXT = st.text(max_size=200)


def test_the_same_prompt_has_the_same_answer(simulate):
    """Two simulators give one answer."""
    assert simulate().anthropic("Why?").json()["content"] == simulate().anthropic("Why?").json()["content"]


def test_an_answer_names_its_question():
    """The digest at the end belongs to this prompt, and to no other."""
    texts = [answer("m", "", [("user", prompt)]).text for prompt in ("One?", "Two?")]
    assert prompt_digest("One?") in texts[0]
    assert prompt_digest("One?") not in texts[1]


def test_the_digest_covers_the_whole_conversation():
    """Another system prompt, an earlier turn or another role is another question."""
    prompts = [
        ([("user", "Why?")], ""),
        ([("user", "Why?")], "Be brief."),
        ([("user", "Hello"), ("assistant", "Hi"), ("user", "Why?")], ""),
        ([("assistant", "Why?")], ""),
    ]
    assert len({prompt_digest(turns, system) for turns, system in prompts}) == len(prompts)


def test_an_answer_takes_up_the_question():
    """It opens with the first sentences of the last user message."""
    turns = [("user", "Ignored."), ("assistant", "Hm."), ("user", "First one. Second one! Third one?")]
    assert answer("m", "", turns).text.startswith("First one. Second one! [")


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("a", 1), ("abcd", 1), ("abcde", 2), ("äöü", 2), ("🙂", 1)])
def test_a_token_is_four_bytes(text, tokens):
    """The simulator's tokenizer can be recounted by hand."""
    assert count_tokens(text) == tokens


def test_every_message_is_rounded_up_by_itself():
    """The prompt's tokens are the sum over the system prompt and the messages."""
    assert count_prompt_tokens("abcde", [("user", "a"), ("assistant", "abcd")]) == 2 + 1 + 1


@given(prompt=TEXT, max_tokens=st.integers(1, 60))
def test_max_tokens_is_never_exceeded(prompt, max_tokens):
    """However the text is cut, it stays within the limit and stays valid text."""
    said = answer("m", "", [("user", prompt)], max_tokens)
    assert count_tokens(said.text) <= max_tokens
    assert (said.finish_reason == "length") == (said.text != answer("m", "", [("user", prompt)]).text)


@given(prompt=TEXT, stop=st.lists(st.text(min_size=1, max_size=3), max_size=4))
def test_no_answer_holds_a_stop_sequence(prompt, stop):
    """Whatever sequence is asked for, the answer ends before its first occurrence."""
    said = answer("m", "", [("user", prompt)], stop=stop)
    assert not any(sequence in said.text for sequence in stop)
    assert (said.finish_reason == "stop_sequence") == (said.stop_sequence in stop)
