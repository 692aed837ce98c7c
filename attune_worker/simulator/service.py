"""What does the provider answer to one request, and what does it write on the invoice?

No I/O here: a request goes in, a ``Reply`` comes out that says what to send, when, and how it ends.
"""

from __future__ import annotations

import json
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from time import time
from typing import Any, Literal, NamedTuple

from attune_worker.simulator.answers import ModelAnswer, answer, count_prompt_tokens, count_tokens
from attune_worker.simulator.fates import Fate, fate
from attune_worker.simulator.invoice import BilledCall, Invoice
from attune_worker.simulator.prefix_cache import PrefixCache
from attune_worker.simulator.profile import Behaviour, Fault, Profile
from attune_worker.simulator.rate import Bucket
from attune_worker.simulator.subscription import Quota, Quotas
from attune_worker.simulator.wire import (
    CLIENT_REQUEST_ID,
    MAX_BODY_BYTES,
    Call,
    Headers,
    Refusal,
    Tokens,
    Wire,
    retry_after_headers,
    to_json,
)

REMEMBERED_REQUESTS = 1000
JSON = "application/json"
PROXY_ERROR_PAGE = b"<html><head><title>502 Bad Gateway</title></head><body>502 Bad Gateway</body></html>"

_SECRET_HEADER_PARTS = ("key", "auth", "token", "cookie", "secret")

Ending = Literal["complete", "hang", "disconnect"]


@dataclass(frozen=True, slots=True)
class Reply:
    """What to send after ``delay_seconds``, and how the connection ends.

    ``bill`` is due then, and what the call used of the quota of the subscription with ``token``.
    """

    status: int
    body: bytes = field(repr=False)
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    ending: Ending = "complete"
    bill: BilledCall | None = None
    token: str | None = field(default=None, repr=False)


class _Seen(NamedTuple):
    """One request that arrived; its headers are masked only when somebody looks."""

    time: float
    path: str
    key: str | None
    model: str | None
    status: int
    headers: Headers


class Service:
    """The provider: a profile, and what it remembers between calls. It belongs to one thread; the invoice is free."""

    def __init__(self, profile: Profile, *, clock: Callable[[], float] = time) -> None:
        self._profile = profile
        self.in_flight = 0
        self._clock = clock
        self._nonce = secrets.token_hex(6)
        self._serial = 0
        self.reset()

    @property
    def profile(self) -> Profile:
        """How it behaves; the quota of a subscription that stays as it was goes on."""
        return self._profile

    @profile.setter
    def profile(self, profile: Profile) -> None:
        self._profile = profile
        self._quotas.apply(profile.subscriptions, self._clock())

    def reset(self) -> None:
        """Forget all calls: the invoice, the call counter, limits, quotas, cached prefixes and remembered requests.

        What is in flight stays in flight, and is billed on the new invoice.
        """
        self.invoice = Invoice()
        self.max_in_flight = self.in_flight
        self._calls = 0
        self._buckets: dict[str, Bucket] = {}
        self._quotas = Quotas(self.profile.subscriptions, self._clock())
        self._prefixes = PrefixCache()
        self._seen: deque[_Seen] = deque(maxlen=REMEMBERED_REQUESTS)

    def call(self, wire: Wire, path: str, headers: Headers, body: bytes) -> Reply:
        """Return the reply to a request for an answer. A reply with a bill is in flight until it is settled."""
        now = self._clock()
        self._serial += 1
        serial = f"{self._nonce}{self._serial:010x}"
        identity = {"content-type": JSON, wire.request_id_header: wire.request_id(serial)}
        key = wire.key(headers)
        call: Call | None = None
        try:
            self._authorise(wire, headers)
            self._check_payment(wire, key)
            call = self._understand(wire, headers, body)
            reply = self._run(wire, call, key, serial, identity, now)
        except Refusal as refusal:
            reply = self._refuse(wire, refusal, call, identity, now)
        except UnicodeEncodeError:
            # JSON can escape half a surrogate pair, which is no text
            reply = self._refuse(wire, wire.invalid("The request body holds invalid Unicode."), call, identity, now)
        shown = self.profile.key_name(key) if key else None
        self._seen.append(_Seen(now, path, shown, call.model if call else None, reply.status, headers))
        if reply.bill:
            self.in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
        return reply

    def settle(self, reply: Reply, *, abandoned: bool) -> Reply:
        """Bill a reply that is about to be sent, or that nobody waited for; return it with what its headers tell now.

        What hangs was billed when it was accepted.
        """
        if reply.bill is None:
            return reply
        self.in_flight -= 1
        if reply.ending == "hang":
            return reply
        told = self._charge(replace(reply.bill, outcome="abandoned") if abandoned else reply.bill, reply.token)
        return replace(reply, headers={**reply.headers, **told})

    def _charge(self, bill: BilledCall, token: str | None) -> dict[str, str]:
        """Put a call on the invoice and on its subscription, and return what the caller is told of the quota."""
        self.invoice.add(bill)
        quota = self._quotas.of(token)
        return quota.count(bill.tokens.input + bill.tokens.output, self._clock()) if quota else {}

    def subscriptions(self) -> dict[str, Any]:
        """Return for each subscription, by its shown name, the calls on it and the use of its windows."""
        now = self._clock()
        return {self.profile.key_name(token): quota.report(now) for token, quota in self._quotas.items()}

    def list_models(self, wire: Wire, headers: Headers) -> Reply:
        """Return the reply to a request for the models on offer: those that the profile names."""
        try:
            self._authorise(wire, headers)
        except Refusal as refusal:
            return self._refuse(wire, refusal, None, {"content-type": JSON}, self._clock())
        return Reply(200, to_json(wire.models(list(self.profile.models))), {"content-type": JSON})

    def requests(self, last: int) -> dict[str, Any]:
        """Return what arrived lately, newest last, and how many calls wait for their answer."""
        recent = list(self._seen)[-last:] if last > 0 else []
        return {
            "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight,
            "requests": [{**seen._asdict(), "headers": _without_secrets(seen.headers)} for seen in recent],
        }

    def _authorise(self, wire: Wire, headers: Headers) -> None:
        key = wire.key(headers)
        misplaced = key in self.profile.subscriptions and wire.subscription(headers) is None
        if misplaced or not self.profile.accepts(key):
            raise wire.wrong_key(key)

    def _check_payment(self, wire: Wire, key: str | None) -> None:
        if key in self.profile.unpaid_keys:
            raise wire.unpaid()
        if key in self.profile.spend_limited_keys:
            raise wire.failure(Fault.SPEND_LIMIT, "", 0)

    def _understand(self, wire: Wire, headers: Headers, body: bytes) -> Call:
        if len(body) > MAX_BODY_BYTES:
            raise wire.too_large()
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            raise wire.invalid("The request body is not valid JSON.") from None
        if not isinstance(fields, dict):
            raise wire.invalid("The request body is not a JSON object.")
        call = wire.parse(fields, headers)
        if not self.profile.knows(call.model):
            raise wire.unknown_model(call.model)
        own_id = headers.get(CLIENT_REQUEST_ID)
        return replace(call, client_request_id=own_id) if own_id else call

    def _run(self, wire: Wire, call: Call, key: str | None, serial: str, identity: dict[str, str], now: float) -> Reply:
        behaviour = self.profile.behaviour(call.model)
        self._admit(wire, call, behaviour, identity, now)
        said = answer(call.model, call.system, call.turns, call.max_tokens, call.stop)
        quota = self._quotas.of(key)
        if quota:
            _admit_to(quota, call, said, identity, now)
        self._calls += 1
        fated = fate(self.profile.seed, self._calls, behaviour)
        _refuse_if_fated(wire, call, behaviour, fated)
        bill = replace(
            self._bill(wire, call, behaviour, said, serial, fated, now),
            key=self.profile.key_name(key) if key else None,
            subscription=quota is not None,
        )
        if fated.fault is Fault.HANG:
            # Nobody can tell when a hanging call is over, so it is billed when it is accepted.
            self._charge(bill, key)
        content = wire.success(bill.id, bill.model, said, bill.tokens, now)
        reply = Reply(200, to_json(content), identity, fated.latency_seconds, bill=bill, token=key)
        return _spoil(reply, fated.fault)

    def _admit(self, wire: Wire, call: Call, behaviour: Behaviour, headers: dict[str, str], now: float) -> None:
        """Take the call from the model's requests per minute, and tell the caller in ``headers`` what is left."""
        limit = behaviour.requests_per_minute
        if limit is None:
            return
        bucket = self._buckets.get(call.model)
        if bucket is None or bucket.limit != limit:
            bucket = self._buckets[call.model] = Bucket.full(limit, now)
        allowance = bucket.take(now)
        headers.update(wire.limit_headers(allowance, now))
        if allowance.wait_seconds:
            raise wire.failure(Fault.RATE_LIMITED, call.model, allowance.wait_seconds)

    def _bill(
        self, wire: Wire, call: Call, behaviour: Behaviour, said: ModelAnswer, serial: str, fated: Fate, now: float
    ) -> BilledCall:
        return BilledCall(
            id=wire.answer_id(serial),
            request_id=wire.request_id(serial),
            time=now,
            wire=wire.name,
            requested_model=call.model,
            model=behaviour.served_as or call.model,
            outcome=fated.fault.value if fated.fault else "succeeded",
            tokens=self._tokens(wire, call, count_tokens(said.text), now),
            price=behaviour.price,
            client_request_id=call.client_request_id,
        )

    def _tokens(self, wire: Wire, call: Call, output_tokens: int, now: float) -> Tokens:
        if not self.profile.cache:
            return Tokens(count_prompt_tokens(call.system, call.turns), output_tokens)
        return self._prefixes.bill(call, output_tokens, now, writes_are_billed=wire.writes_are_billed)

    def _refuse(self, wire: Wire, refusal: Refusal, call: Call | None, headers: dict[str, str], now: float) -> Reply:
        if refusal.wait_seconds is not None:
            form = self.profile.behaviour(call.model if call else "").retry_after.form
            headers.update(retry_after_headers(refusal.wait_seconds, form, now))
        request_id = headers.get(wire.request_id_header, "")
        return Reply(refusal.status, to_json(wire.error(refusal, request_id)), headers)


def _admit_to(quota: Quota, call: Call, said: ModelAnswer, headers: dict[str, str], now: float) -> None:
    """Raise the refusal of a call for which a window has no room, and tell the caller in ``headers`` why."""
    tokens = count_prompt_tokens(call.system, call.turns) + count_tokens(said.text)
    if refused := quota.admit(tokens, now):
        refusal, told = refused
        headers.update(told)
        raise refusal


def _refuse_if_fated(wire: Wire, call: Call, behaviour: Behaviour, fated: Fate) -> None:
    """Raise the refusal that fate, or the length of the prompt, has in store; cheap where there is none."""
    window = behaviour.context_window
    if fated.fault is Fault.CONTEXT_TOO_LONG or window is not None:
        prompt_tokens = count_prompt_tokens(call.system, call.turns)
        if window is not None and prompt_tokens > window:
            raise wire.too_long(prompt_tokens, window)
        if fated.fault is Fault.CONTEXT_TOO_LONG:
            raise wire.too_long(prompt_tokens, prompt_tokens - 1)
    if fated.fault is not None and not fated.fault.billed:
        raise wire.failure(fated.fault, call.model, behaviour.retry_after.seconds)


def _spoil(reply: Reply, fault: Fault | None) -> Reply:
    """Return the reply with what a fault does to an answer that was already paid for."""
    match fault:
        case Fault.HANG:
            return replace(reply, ending="hang")
        case Fault.DISCONNECT:
            return replace(reply, ending="disconnect")
        case Fault.TRUNCATED:
            return replace(reply, body=reply.body[: len(reply.body) // 2])
        case Fault.MALFORMED:
            return replace(reply, body=PROXY_ERROR_PAGE, headers={**reply.headers, "content-type": "text/html"})
        case _:
            return reply


def _without_secrets(headers: Mapping[str, str]) -> dict[str, str]:
    return {
        name.lower(): "[hidden]" if any(part in name.lower() for part in _SECRET_HEADER_PARTS) else value
        for name, value in headers.items()
    }
