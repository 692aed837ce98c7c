"""What must a provider adapter know? How to build a request, read an answer, and name a failure.

An adapter is pure: values in, values out, no I/O and no clock of its own. ``providers/http.py`` sends
what it builds. A third party adds a provider by publishing a class with these methods under the
entry point group ``attune_worker.providers``; its entry point's name is the ``kind`` in ``attune.toml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from attune_worker.errors import ProviderError
from attune_worker.jobs import Message, Usage


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a provider is, and the key that opens it (which no repr shows).

    ``bearer``: the key is the bearer token of a subscription, for wire formats that tell the two apart.
    """

    name: str
    base_url: str
    api_key: str | None = field(default=None, repr=False)
    bearer: bool = False


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What is asked of a model, in no provider's words yet.

    ``max_tokens`` bounds the output. ``end_user`` is an opaque hash for the provider's abuse
    detection, ``session`` groups calls that share a prefix, for the provider's prompt cache. ``call_id``
    is our id of the call, sent as ``x-client-request-id`` where the wire format has room for headers: with it the
    provider's account can be held against ours.
    """

    model_id: str
    messages: tuple[Message, ...] = field(repr=False)
    max_tokens: int
    system: str | None = field(default=None, repr=False)
    temperature: float | None = None
    stop: tuple[str, ...] = ()
    end_user: str | None = None
    session: str | None = None
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """What is to be sent as it is. Headers hold the key and the body the prompt, so neither is in the repr."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    method: str = "POST"


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """An answer that has arrived in full; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a provider said.

    ``finish_reason``: stop, length, content_filter, tool_use, or the provider's own word. ``usage`` is None when
    the provider did not count: then the cost of the call is not known.
    """

    content: str = field(repr=False)
    finish_reason: str
    usage: Usage | None
    model_id: str | None = None
    request_id: str | None = None


class Provider(Protocol):
    """One wire format."""

    def misfit(self, temperature: float | None, stop: tuple[str, ...]) -> str | None:
        """Say which of these the wire format has no room for, or return None."""
        ...

    def build(self, endpoint: Endpoint, chat: ChatRequest) -> HttpRequest:
        """Return the request that asks ``chat`` of ``endpoint``."""
        ...

    def parse(self, response: HttpResponse) -> Answer:
        """Read a 2xx response; raises ``MalformedAnswerError`` for anything the wire format does not allow."""
        ...

    def failure(self, response: HttpResponse) -> ProviderError:
        """Name the failure that a response other than 2xx stands for; never raises."""
        ...


@runtime_checkable
class ListsModels(Protocol):
    """A wire format that can ask which models there are, at no cost; that tells whether a key is good."""

    def models_request(self, endpoint: Endpoint) -> HttpRequest:
        """Return the request for the models of ``endpoint``."""
        ...
