"""How does one run go? Jobs come in, faults happen, and in the end everything is looked at."""

from __future__ import annotations

import heapq
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import psutil
from chaos_attune import AttuneWorker
from chaos_bare import BareCelery
from chaos_contenders import Contender, Findings, Order, Seen, Services, make_orders
from chaos_faults import ON_WORKERS, Fault, Kind, load_seconds, pace, plan
from chaos_fleet import CLOCK_HOUR_SECONDS, Fleet, Life
from chaos_journal import CONFIGURATION, Journal, commands_in
from redis import Redis
from redis.exceptions import RedisError
from tcp_proxy import LOOPBACK, TcpProxy

from attune_worker.errors import ServiceUnavailableError
from attune_worker.simulator import Errors, LognormalLatency, Profile, RetryAfter, Simulator
from attune_worker.store.embedded import EmbeddedRedis

WORKERS = 4
JOBS_PER_SECOND = 10_000 / 600
ERRORS = Errors(
    rate_limited=0.04,
    overloaded=0.04,
    server_error=0.04,
    bad_request=0.005,
    hang=0.01,
    disconnect=0.03,
    truncated=0.02,
    malformed=0.015,
)
"""A fifth of all calls; of these 0.075 are billed all the same."""

RETRY_AFTER_SECONDS = 0.3
LATENCY_SIGMA = 0.6
TICK_SECONDS = 0.05
BATCH_SECONDS = 0.25
SENT_TWICE = 20
LONGEST_PUT_OFF_SECONDS = 60.0
"""How long faults may be put off in all."""

END_SECONDS = 60.0
"""How long workers may take, beyond the grace of their settings, to end when all is over."""

Progress = Callable[[str, int, int], None]
"""Told what happened last, how many jobs have ended, and how many there are."""


@dataclass
class Outcome:
    """What one run of one contender showed. Times are in seconds."""

    contender: str
    jobs: int
    findings: Findings
    faults: Sequence[Fault]
    lives: Sequence[Life]
    persistent: bool
    billed: dict[str, int]
    billed_usd: str
    seconds: dict[str, float]
    redis_away: Sequence[tuple[float, float]]


@dataclass
class Place:
    """Everything that a run has started, but for the contender's workers."""

    server: EmbeddedRedis
    proxy: TcpProxy
    simulator: Simulator
    folder: Path

    def redis_pid(self) -> int:
        """Return the process of the Redis server."""
        with Redis.from_url(self.server.url) as redis:
            return int(redis.info("server")["process_id"])

    def appends(self) -> bool:
        """Whether Redis writes down each command before it answers it."""
        with Redis.from_url(self.server.url) as redis:
            return bool(redis.config_get("appendonly")["appendonly"] == "yes")


class Caller:
    """Submits the jobs at a steady pace, from a thread; what may not have arrived is submitted again."""

    def __init__(self, contender: Contender, orders: Sequence[Order], seconds: float) -> None:
        self.submitted = 0
        self.failures = 0
        self._contender = contender
        self._orders = orders
        self._seconds = seconds
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="caller", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Submit no more."""
        self._ending.set()
        self._thread.join()

    @property
    def done(self) -> bool:
        """Whether all have been submitted."""
        return self.submitted == len(self._orders)

    @property
    def latest(self) -> Sequence[Order]:
        """The jobs that were submitted last."""
        return self._orders[max(self.submitted - SENT_TWICE, 0) : self.submitted]

    def _run(self) -> None:
        began = time.monotonic()
        while not self.done and not self._ending.wait(BATCH_SECONDS):
            due = min(int((time.monotonic() - began) / self._seconds * len(self._orders)) + 1, len(self._orders))
            try:
                self._contender.submit(self._orders[self.submitted : due])
            except ServiceUnavailableError:
                self.failures += 1
                continue
            self.submitted = due


@dataclass
class Havoc:
    """Breaks things, and mends them when their time has come."""

    place: Place
    fleet: Fleet
    contender: Contender
    caller: Caller
    away: list[tuple[float, float]] = field(default_factory=list)
    sent_twice: set[int] = field(default_factory=set)
    _later: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: count[int] = field(default_factory=count)

    def inflict(self, fault: Fault) -> None:
        """Let a fault happen."""
        match fault.kind:
            case Kind.KILL:
                self.contender.killed(self.fleet.kill(self.fleet.choose(fault.choice)))
            case Kind.STOP:
                life = self.fleet.stop(self.fleet.choose(fault.choice))
                self._after(fault.lasts_seconds, lambda: self.fleet.resume(life))
            case Kind.TERMINATE:
                self.fleet.terminate(self.fleet.choose(fault.choice))
            case Kind.SKEW:
                hour = CLOCK_HOUR_SECONDS if fault.choice < 0.5 else -CLOCK_HOUR_SECONDS
                self.fleet.terminate(self.fleet.choose(fault.choice), hour)
            case Kind.CUT:
                self.place.proxy.cut()
            case Kind.DOUBLE:
                again = self.caller.latest
                self.contender.send_again(again)
                self.sent_twice |= {order.number for order in again}
            case _:
                self._take_redis_away(fault)

    def mend(self, *, everything: bool = False) -> None:
        """Undo the faults whose time has come, or all of them."""
        while self._later and (everything or self._later[0][0] <= time.monotonic()):
            heapq.heappop(self._later)[2]()

    def _take_redis_away(self, fault: Fault) -> None:
        began = time.monotonic()
        if fault.kind is Kind.PAUSE:
            server = psutil.Process(self.place.redis_pid())
            server.suspend()
            back = server.resume
        else:
            self.place.server.stop()
            back = self.place.server.start

        def mend() -> None:
            back()
            self.away.append((began, time.monotonic()))

        self._after(fault.lasts_seconds, mend)

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), action))


def run(kind: str, seconds: float, seed: int, folder: Path, progress: Progress) -> Outcome:
    """Run one contender through one plan of faults; all that was started has ended when this returns, or raises."""
    rhythm, orders = pace(seconds), make_orders(seed, round(seconds * JOBS_PER_SECOND))
    profile = Profile(
        seed=seed,
        latency=LognormalLatency(median_seconds=rhythm.latency_seconds, sigma=LATENCY_SIGMA),
        errors=ERRORS,
        retry_after=RetryAfter(seconds=RETRY_AFTER_SECONDS),
    )
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedRedis(folder / "redis", configuration=CONFIGURATION))
        proxy = stack.enter_context(TcpProxy(server.port or 0))
        simulator = stack.enter_context(Simulator(profile))
        place = Place(server, proxy, simulator, folder)
        seen_url = server.url.replace(f"@{LOOPBACK}:{server.port}/", f"@{LOOPBACK}:{proxy.port}/")
        services = Services(seen_url, server.url, simulator.url, folder, rhythm, orders)
        contender = _contender(kind, services)
        stack.callback(contender.close)
        fleet = Fleet(WORKERS, contender.worker, folder)
        stack.callback(fleet.kill_all)
        fleet.wait_until_ready()
        caller = Caller(contender, orders, load_seconds(seconds))
        stack.callback(caller.stop)
        havoc = Havoc(place, fleet, contender, caller)
        stack.callback(lambda: havoc.mend(everything=True))
        return _Run(place, fleet, contender, caller, havoc, plan(seed, seconds), progress).through(seconds)


def _contender(kind: str, services: Services) -> Contender:
    return AttuneWorker(services) if kind == "attune" else BareCelery(services, late=kind == "celery-late")


@dataclass
class _Run:
    """One run, from the first job to the findings."""

    place: Place
    fleet: Fleet
    contender: Contender
    caller: Caller
    havoc: Havoc
    faults: Sequence[Fault]
    progress: Progress
    _ended: int = 0
    _asked: float = 0.0
    _news: str = "jobs come in"

    def through(self, seconds: float) -> Outcome:
        """Submit, break, wait, and look."""
        rhythm, began = pace(seconds), time.monotonic()
        persistent = self.place.appends()
        self.caller.start()
        self._load(began, load_seconds(seconds))
        self.havoc.mend(everything=True)
        self._news = "faults are over"
        loaded = time.monotonic()
        while time.monotonic() < loaded + rhythm.drain_seconds and not self._all_done():
            self._tick()
        drained = time.monotonic()
        self.caller.stop()
        self._show("workers end")
        self.fleet.end(rhythm.grace_seconds + END_SECONDS)
        bill = self.place.simulator.invoice()
        (self.place.folder / "bill.json").write_text(json.dumps(bill))
        seen = Seen(
            self.fleet.lives,
            Journal.of(commands_in(self.place.server.folder)),
            bill["calls"],
            self.havoc.away,
            self.havoc.sent_twice,
            time.time() - time.monotonic(),
        )
        findings = self.contender.findings(seen)
        return Outcome(
            self.contender.name,
            self.caller.submitted,
            findings,
            self.faults,
            self.fleet.lives,
            persistent,
            dict(Counter(line["outcome"] for line in seen.bill)),
            bill["total_usd"],
            {"load": loaded - began, "drain": drained - loaded, "end": time.monotonic() - drained},
            [(start - began, end - began) for start, end in self.havoc.away],
        )

    def _load(self, began: float, seconds: float) -> None:
        """Inflict the faults; all that are left are put off while the workers that a machine is slow to start are few.

        With nobody there to see a worker die, or to run its jobs, recovery would be put off by the bench.
        """
        waiting, due = list(self.faults), began
        while time.monotonic() < due + seconds:
            if waiting and time.monotonic() >= due + waiting[0].at_seconds:
                put_off = time.monotonic() - waiting[0].at_seconds
                few = waiting[0].kind in ON_WORKERS and not self.fleet.can_spare_one()
                if few and put_off < began + LONGEST_PUT_OFF_SECONDS:
                    due = put_off
                    self._tick()
                    continue
                fault = waiting.pop(0)
                self._show(fault.kind.value)
                self.havoc.inflict(fault)
            self._tick()

    def _tick(self) -> None:
        self.havoc.mend()
        self.fleet.look_after()
        self.contender.look()
        if time.monotonic() > self._asked + 1:
            self._asked = time.monotonic()
            self._show(self._news)
        time.sleep(TICK_SECONDS)

    def _all_done(self) -> bool:
        return self.caller.done and self._ended == self.caller.submitted

    def _show(self, news: str) -> None:
        self._news = news
        with suppress(RedisError, ServiceUnavailableError):
            self._ended = self.contender.ended()
        self.progress(news, self._ended, self.caller.submitted)
