"""Can providers be called from here: is there a key, do they answer, do they take the key, and what do they cost?

A provider is asked for its list of models, with each of its keys: that costs nothing, starts nothing, uses no quota,
and is refused to a bad key. A subscription's token is sent for nothing else. A key goes where every call takes it, to
the provider's ``base_url``, over the same connection and proxy; redirects are not followed. What a provider says is not
shown, only its status: some repeat the key.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from attune_worker.credentials import missing
from attune_worker.doctor.finding import Finding, Level
from attune_worker.errors import ProviderError
from attune_worker.models.credentials import credentials_of
from attune_worker.models.price_list import get_pricing
from attune_worker.models.registry import Registry
from attune_worker.origins import origins
from attune_worker.providers import adapter
from attune_worker.providers.base import Endpoint, HttpRequest, ListsModels
from attune_worker.providers.http import HttpSender
from attune_worker.sections import DEFAULT_CREDENTIAL, ProviderSettings
from attune_worker.settings import Settings, masked

PATIENCE_SECONDS = 5.0
"""How long a provider may take for its list of models; all are asked at the same time."""

MAX_THREADS = 16


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of asking a provider; ``status`` is None where nothing came, and ``error`` says why.

    ``key_sent``: the request had a key, and a good one is needed for it. ``credential`` is the key's name, told where
    its provider has ``others``.
    """

    provider: str
    place: str
    key_sent: bool
    lists_models: bool
    status: int | None = None
    ms: float = 0.0
    error: str = ""
    credential: str = DEFAULT_CREDENTIAL
    others: bool = False

    @property
    def refused(self) -> bool:
        """Whether the provider does not take the key, so that calls by it fail."""
        return self.key_sent and self.status in (401, 402)

    @property
    def name(self) -> str:
        """What was asked, in words."""
        return f"{self.provider}/{self.credential}" if self.others else self.provider


def look(settings: Settings, environ: Mapping[str, str], *, offline: bool = False) -> Iterator[Finding]:
    """Look at keys and prices and, unless ``offline``, ask the providers."""
    usable = {name for name, provider in settings.providers.items() if provider.usable(environ)}
    yield _keys(settings, usable)
    yield from _missing(settings, environ)
    yield from _prices(settings, usable)
    if not offline:
        yield from judged(_asked(settings, sorted(usable), environ))


def judged(replies: Sequence[Reply]) -> Iterator[Finding]:
    """Judge what came of asking; that one does not answer is bearable while others do."""
    silence = Level.WARNING if any(reply.status is not None for reply in replies) else Level.UNREACHABLE
    served = {reply.provider for reply in replies if reply.status is not None and _takes(reply.status)}
    told: set[str] = set()
    for reply in replies:
        if reply.status is None:
            if reply.provider in told:  # it was asked with each of its keys, which is not what keeps it silent
                continue
            told.add(reply.provider)
            text = f"{reply.provider} does not answer at {reply.place}: {reply.error}"
            fix = "Look at base_url, http.proxy and this machine's network, or at the provider's status page."
            yield Finding("provider", silence, text, fix)
        elif reply.refused and reply.provider in served:
            found = _judged(reply, reply.status)
            yield Finding("provider", Level.WARNING, f"{found.text}; others go on", found.fix)
        else:
            yield _judged(reply, reply.status)


def _takes(status: int) -> bool:
    return 200 <= status < 300 or status == 429


def _judged(reply: Reply, status: int) -> Finding:
    name, answers = reply.name, f"{reply.name} answers in {reply.ms:.0f} ms"
    if not reply.lists_models:
        return Finding("provider", Level.OK, f"{answers}; its wire format has no way to try the key")
    if 200 <= status < 300:
        return Finding("provider", Level.OK, f"{answers}{' and takes the key' if reply.key_sent else ''}")
    if status == 401 and not reply.key_sent:
        text = f"{name} wants a key (401), and none is set"
        return Finding("provider", Level.FAILED, text, f"Set providers.{reply.provider}.api_key.")
    if 300 <= status < 400:
        text = f"{name} points elsewhere ({status}), and calls follow nobody"
        return Finding("provider", Level.WARNING, text, "Set base_url to the new place.")
    level, text, fix = _OF_STATUS.get(status, (Level.WARNING, "answers with an error", _SEE_STATUS_PAGE))
    return Finding("provider", level, f"{name} {text} ({status})", fix)


_SEE_STATUS_PAGE = "Look at the provider's status page."

_OF_STATUS = {
    401: (
        Level.FAILED,
        "refuses the key, so its calls fail",
        "Renew the key. One that is restricted may be good for calls and not for this: let it read models.",
    ),
    402: (
        Level.FAILED,
        "wants to be paid, so its calls fail",
        "Pay, or raise the spend limit, at the provider.",
    ),
    403: (
        Level.WARNING,
        "does not let this key list models; calls may be allowed all the same",
        "Try a job, and see to the key's permissions and the provider's list of allowed addresses.",
    ),
    404: (Level.WARNING, "has no list of models at base_url", "See whether base_url has the right path."),
    407: (Level.WARNING, "is behind a proxy that wants a password", "Set user and password in http.proxy."),
    429: (Level.WARNING, "answers that its limit is used up", "Wait; set its limits in providers if it stays so."),
}
"""What a status means here. OpenAI answers 401, not 403, to a key that is good but may not list models."""


def _asked(settings: Settings, names: Sequence[str], environ: Mapping[str, str]) -> list[Reply]:
    if not names:
        return []
    sender = HttpSender(settings.http)
    questions = [one for name in names for one in _questions(name, settings.providers[name], environ)]
    ask = partial(_ask, settings, sender)
    with ThreadPoolExecutor(min(MAX_THREADS, len(questions)), thread_name_prefix="attune-doctor") as threads:
        return list(threads.map(ask, questions))


def _ask(settings: Settings, sender: HttpSender, question: _Question) -> Reply:
    name, provider = question.endpoint.name, settings.providers[question.endpoint.name]
    request, lists = _request(question.endpoint, provider)
    began = time.perf_counter()
    place = _place(provider.base_url)
    if settings.http.proxy:
        place += f", through {masked(settings.http.proxy.get_secret_value())}"
    keyed = lists and question.endpoint.api_key is not None
    others = len(provider.credentials) + (provider.api_key is not None) > 1
    reply = partial(Reply, name, place, keyed, lists, credential=question.credential, others=others)
    try:
        response = sender.send(request, PATIENCE_SECONDS)
    except ProviderError as error:
        return reply(error=error.message)
    return reply(response.status, (time.perf_counter() - began) * 1000)


@dataclass(frozen=True, slots=True)
class _Question:
    """A provider to be asked by one of its credentials."""

    credential: str
    endpoint: Endpoint


def _questions(name: str, provider: ProviderSettings, environ: Mapping[str, str]) -> list[_Question]:
    """Return with which credentials a provider is asked; once, with none, where that could not try them."""
    if not isinstance(adapter(provider.kind), ListsModels):
        return [_Question(DEFAULT_CREDENTIAL, Endpoint(name, provider.base_url))]
    keys = provider.keys(environ)
    found = credentials_of(provider, environ)
    return [
        _Question(one.name, Endpoint(name, provider.base_url, keys[one.name], bearer=one.subscription)) for one in found
    ]


def _request(endpoint: Endpoint, provider: ProviderSettings) -> tuple[HttpRequest, bool]:
    """Return the request, and whether it asks for models; with that, nothing is used up."""
    wire = adapter(provider.kind)
    if isinstance(wire, ListsModels):
        return wire.models_request(endpoint), True
    return HttpRequest(provider.base_url, {}, b"", "GET"), False


def _place(base_url: str) -> str:
    parts = urlsplit(base_url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


def _keys(settings: Settings, usable: set[str]) -> Finding:
    without = sorted(set(settings.providers) - usable)
    text = f"can be called from here: {', '.join(sorted(usable)) or 'none'}"
    if without:
        text += f"; without a key: {', '.join(without)}"
    if usable:
        return Finding("providers", Level.OK, text)
    fix = "Workers need a provider's key, for instance ANTHROPIC_API_KEY."
    return Finding("providers", Level.WARNING, text, fix)


def _missing(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Tell of keys that somebody has configured, and that are not here, while others of their provider are."""
    written = {one.name for one in origins(settings, environ)}  # providers are there with an api_key by themselves, too
    for found in missing(settings, environ):
        own = found.one.name != DEFAULT_CREDENTIAL or f"providers.{found.provider}.api_key" in written
        if own and found.others:
            what = found.one.variable or f"the secret of {found.provider}/{found.one.name}"
            fix = f"Set {what} wherever workers run, and start them anew: they read it once. Or take it out."
            yield Finding("providers", Level.WARNING, str(found), fix)


def _prices(settings: Settings, usable: set[str]) -> Iterator[Finding]:
    unpriced = [
        model.ref
        for model in Registry.from_settings(settings).all()
        if model.provider in usable and get_pricing(model) is None
    ]
    if unpriced:
        yield Finding(
            "prices",
            Level.WARNING,
            f"not known of {', '.join(unpriced)}: the cost of these calls is unknown, and hard budgets refuse them",
            "Set input_cost_per_million and output_cost_per_million in [[models]], or price_list of the provider.",
        )
    elif usable:
        yield Finding("prices", Level.OK, "known of all models that can be called")
