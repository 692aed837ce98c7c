"""May this call be made now, and what did it do? ADMIT before each call to a provider, SETTLE after it.

Both are one round trip to Redis, for breaker, cooldowns, limits, budgets and telemetry together. While Redis is
away this process goes by what it has seen itself, and keeps its settlements until they can be written.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from redis.exceptions import ResponseError

from attune_worker.budget import BudgetKey
from attune_worker.errors import ServiceUnavailableError
from attune_worker.models import decisions
from attune_worker.models.admit_wire import AdmitWire
from attune_worker.models.calls import Charged, Outcome, Permit, Quote, Refusal, Request, circuits_of
from attune_worker.models.local_circuits import LocalCircuits
from attune_worker.models.refusals import OF_CIRCUITS, WHY, refusal_of
from attune_worker.models.settle_wire import CREDENTIAL, FIRST_BUDGET, Settlement, SettleWire
from attune_worker.models.wire import in_ms, told
from attune_worker.settings import Settings
from attune_worker.store.backlog import Backlog
from attune_worker.store.circuits import Grant
from attune_worker.store.connection import close_idle, connect, reaching, together
from attune_worker.store.keys import FleetKeys
from attune_worker.store.outage import Outage
from attune_worker.store.scripts import Script

logger = logging.getLogger(__name__)

ADMIT = Script("admit", "values", "breaker", "limits", "credentials", "budget")
SETTLE = Script("settle", "values", "breaker", "limits", "credentials", "budget", "telemetry", "ledger")

JOB_SECONDS = 0.5
"""When to ask again for a call of a job while Redis is away: its thread could begin nothing else either."""

LONGEST_OUTAGE_WAIT_SECONDS = 2.0
"""How long after Redis is back calls may still be refused, or settlements kept."""

LEASE_MARGIN_SECONDS = 30.0
"""How much longer than a call may take its slot and its probe are held for it."""

CLOSE_SECONDS = 5.0
"""How long the end of a process may be put off by settlements that wait for Redis."""

WITHOUT_REDIS_SECONDS = 5.0
"""When to ask again for a call that only Redis can allow: one under a hard budget, or by subscription."""

SOON_SECONDS = 0.1

NO_ROOM = ("OOM", "MISCONF", "READONLY", "LOADING", "BUSY", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN")
"""Codes of what is wrong with Redis itself, whatever it was told; Redis 6 quotes them in a script's error."""


@dataclass(frozen=True, slots=True)
class _Undated:
    """What a call did, told by a process that has not heard Redis' clock yet: its times follow when it is written."""

    permit: Permit
    outcome: Outcome
    ended: float
    """By this process's monotonic clock, in seconds."""


class Admission:
    """Asks leave for the calls of one process and settles them; safe for use from many threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._redis = connect(settings)
        self._lease_ms = round((settings.http.request_timeout_seconds + LEASE_MARGIN_SECONDS) * 1000)
        self._worker = f"{socket.gethostname()}:{os.getpid()}"
        self._outage = Outage(longest_wait_seconds=LONGEST_OUTAGE_WAIT_SECONDS)
        self._local = LocalCircuits(settings.breaker)
        self._unsettled: Backlog[Settlement | _Undated] = Backlog(self._write_all, self._outage)
        self._clock_offset_ms: float | None = None
        self._admit_wire = AdmitWire(settings, self._worker, self._lease_ms)
        self._settle_wire = SettleWire(settings, self._worker)

    def admit(self, request: Request) -> Permit | Refusal:
        """Return leave for a call to the first of the candidates that may be called, or say when to ask again."""
        charged = self._admit_wire.charged(request)
        if self._outage.worth_trying():
            try:
                with reaching(self._settings):
                    answer = ADMIT(self._redis, *self._admit_wire.admit(request, charged))
            except ServiceUnavailableError as error:
                if refused(error):
                    raise
                if self._outage.failed(error):
                    logger.warning("going by what this process has seen itself: %s", error)
                request = self._take_back(request, charged)
            except BaseException:  # interrupted: Redis may have given leave for a call that nobody will make
                self._take_back(request, charged)
                raise
            else:
                self._reached()
                return self._verdict(request, charged, answer)
        verdict = self._own_verdict(request, charged)
        decisions.tell_own(request, verdict)
        return verdict

    def settle(self, permit: Permit, outcome: Outcome) -> None:
        """Write down what a call did; while Redis is away it is kept, and written later."""
        self._remember(permit, outcome)
        settlement = self._settlement(permit, outcome)
        if not self._outage.worth_trying():
            self._unsettled.add(settlement)
            return
        try:
            self._write(settlement)
        except ServiceUnavailableError as error:
            if self._outage.failed(error):
                logger.warning("settlements are kept until Redis answers: %s", error)
            self._unsettled.add(settlement)
        else:
            self._reached()

    def give_back(self, permit: Permit) -> None:
        """Give back leave for a call that was never made, without waiting for Redis."""
        self.settle_later(permit, Outcome.released())

    def settle_later(self, permit: Permit, outcome: Outcome) -> None:
        """Settle as ``settle`` does, without waiting for Redis."""
        self._remember(permit, outcome)
        self._unsettled.add(self._settlement(permit, outcome))

    def close(self) -> None:
        """Write what is left, for a while, and give the connections back."""
        self._unsettled.close(CLOSE_SECONDS)
        close_idle(self._redis)

    def _take_back(self, request: Request, charged: Charged) -> Request:
        """Return the request under another id: Redis may have heard the first, or may yet, and what it took comes back.

        Which of the candidates it took nobody knows; SETTLE passes over those that it did not.
        """
        for quote, budgets in zip(request.quotes, charged, strict=True):
            unheard = _permit(request, quote, budgets, self._now_ms())
            self._unsettled.add(self._settlement(unheard, Outcome.released()))
        return replace(request, call_id=uuid4().hex)

    def _remember(self, permit: Permit, outcome: Outcome) -> None:
        """Keep this process's own view of the circuits."""
        result = told(
            call=permit.call_id,
            outcome=outcome.health,
            latency_ms=outcome.latency_ms,
            worker=self._worker,
            generation=permit.own_generation,
            retry_after_ms=in_ms(outcome.retry_after),
        )
        self._local.record({circuits_of(permit.model)[0]: result})

    def _reached(self) -> None:
        if self._outage.succeeded():
            logger.info("Redis answers again")

    def _verdict(self, request: Request, charged: Charged, answer: list[Any]) -> Permit | Refusal:
        if answer[0] == b"refused":
            now_ms, refusals = answer[1], answer[2]
            for quote, (_, at, why, *_) in zip(request.quotes, refusals, strict=True):
                if why in OF_CIRCUITS:
                    self._local.adopt(circuits_of(quote.model)[0], Grant(False, max(0, int(at) - now_ms), why.decode()))
            decisions.tell_refusal(request, charged, refusals)
            return refusal_of(request, charged, now_ms, refusals)
        if answer[0] != b"admitted":  # the call was settled before it was made; another one may be
            return Refusal("leave for this call was given back already", SOON_SECONDS)
        _, place, now_ms, admitted_ms, probes, passed_over = answer
        self._clock_offset_ms = now_ms - time.time() * 1000
        self._local.adopt(circuits_of(request.quotes[place].model)[0], Grant(True, 0, ""))
        permit = _permit(request, request.quotes[place], charged[place], admitted_ms)
        decisions.tell_leave(request, charged, permit, probes, passed_over)
        return permit

    def _own_verdict(self, request: Request, charged: Charged) -> Permit | Refusal:
        """Decide without Redis, by what this process has seen: not for a job, a hard budget or a subscription."""
        if self._unsettled.full:
            return Refusal("Redis is away, and no more settlements can be kept", WITHOUT_REDIS_SECONDS)
        if request.lease:  # should its worker die, nobody would know of the call
            return Refusal("Redis is away, and no call of a job is begun that it does not know of", JOB_SECONDS)
        waits = []
        for quote, budgets in zip(request.quotes, charged, strict=True):
            if quote.credential.subscription:
                waits.append(("a quota cannot be kept while Redis is away", WITHOUT_REDIS_SECONDS))
                continue
            if any(one.hard_nano is not None for one in budgets):
                waits.append(("a hard budget cannot be kept while Redis is away", WITHOUT_REDIS_SECONDS))
                continue
            names = circuits_of(quote.model)
            grant = self._local.ask(names, request.call_id, self._lease_ms)
            if grant.allowed:
                [(generation, _), *_] = grant.permits
                return _permit(request, quote, budgets, self._now_ms(), generation)
            reason = f"{quote.model.ref}: {WHY[grant.reason.encode()]}, as far as this process knows"
            waits.append((reason, grant.wait_ms / 1000))
        reason, wait_seconds = min(waits, key=lambda one: one[1])
        return Refusal(reason, wait_seconds)

    def _settlement(self, permit: Permit, outcome: Outcome) -> Settlement | _Undated:
        if self._clock_offset_ms is None:
            return _Undated(permit, outcome, time.monotonic())
        return self._settle_wire.settle(permit, outcome, self._now_ms())

    def _dated(self, settlement: Settlement | _Undated) -> Settlement:
        """Return what can be written; asks for Redis' time where that is not known yet."""
        if not isinstance(settlement, _Undated):
            return settlement
        if self._clock_offset_ms is None:
            [answer] = together(self._redis, [(FleetKeys(self._settings.namespace).calls, ("TIME",))])
            if isinstance(answer, Exception):
                raise answer
            seconds, micros = answer
            self._clock_offset_ms = seconds * 1000 + micros / 1000 - time.time() * 1000
        ago_ms = round((time.monotonic() - settlement.ended) * 1000)
        return self._settle_wire.settle(settlement.permit, settlement.outcome, self._now_ms() - ago_ms)

    def _write(self, settlement: Settlement | _Undated) -> None:
        try:
            with reaching(self._settings):
                keys, texts = self._dated(settlement)
                answer = SETTLE(self._redis, keys, texts)
        except ServiceUnavailableError as error:
            if not refused(error):
                raise
            call = settlement.permit.call_id if isinstance(settlement, _Undated) else settlement[0][0]
            logger.exception("call %s could not be settled in full", call)  # again would fail again
            return
        self._report(keys, *answer)

    def _write_all(self, settlements: Sequence[Settlement | _Undated]) -> None:
        try:
            with reaching(self._settings):
                dated = [self._dated(one) for one in settlements]
                answers = SETTLE.many(self._redis, dated)
        except ServiceUnavailableError as error:
            if not refused(error):
                raise
            for settlement in settlements:  # one of them is to blame; twice is once for the others
                self._write(settlement)
        else:
            for (keys, _), answer in zip(dated, answers, strict=True):
                self._report(keys, *answer)

    def _report(
        self, keys: Sequence[str], _: bytes, event: bytes, passed: Sequence[int], of_provider: bytes, key: bytes
    ) -> None:
        for circuit, change in ((keys[3], event), (keys[4], of_provider)):
            if change:
                level = logging.INFO if change == b"closed" else logging.WARNING
                logger.log(level, "circuit %s: %s", circuit.partition(":breaker:")[2], change.decode())
        name = keys[CREDENTIAL].partition(":credential:")[2]
        if key == b"refused":
            again = self._settings.auth.recheck_seconds
            logger.warning("credential %s: its provider refused it; one call tries it again in %g s", name, again)
        elif key:
            logger.info("credential %s: its provider accepts it again", name)
        for place in passed:
            logger.warning("soft budget %s is used up", keys[FIRST_BUDGET + place])

    def _now_ms(self) -> int:
        """Return Redis' time as far as this process knows it: the clocks differ by what they differed last.

        0 where Redis has never told it: the process's own clock may be days off.
        """
        if self._clock_offset_ms is None:
            return 0
        return round(time.time() * 1000 + self._clock_offset_ms)


def _permit(
    request: Request, quote: Quote, budgets: tuple[BudgetKey, ...], admitted_ms: int, own_generation: int | None = None
) -> Permit:
    return Permit(
        request.call_id, request.job, quote, budgets, admitted_ms, own_generation, request.job_id, request.lease
    )


def refused(error: ServiceUnavailableError) -> bool:
    """Whether Redis is there and did not like what it was told; then waiting does not help."""
    cause = error.__cause__
    return type(cause) is ResponseError and not any(code in str(cause) for code in NO_ROOM)
