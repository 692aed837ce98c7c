"""The fleet keeps its promises while everything breaks; and the bench would notice if it did not."""

import importlib
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import psutil
import pytest
from redis import Redis

from attune_worker.jobs import Attempt, JobResult, JobStatus
from attune_worker.ledger_record import LedgerRecord
from attune_worker.simulator import FixedLatency, Profile, Simulator
from attune_worker.store.embedded import EmbeddedRedis
from attune_worker.store.record import Record

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "chaos.py"
DONE, FAILED, RUNNING = JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.RUNNING
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
BUSY_RECOVERY_SECONDS = 40.0
"""The bench holds the fleet to 20 s; here it shares the cores with other tests, and may need longer."""


def load(name):
    """Return a module of the benchmarks, which are scripts and in no package."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module(name)


bare, bill, checks, contenders = map(load, ("chaos_bare", "chaos_bill", "chaos_checks", "chaos_contenders"))
extras, faults, fleet, journal = map(load, ("chaos_extras", "chaos_faults", "chaos_fleet", "chaos_journal"))
tcp_proxy = load("tcp_proxy")


def test_short_run_keeps_every_promise(tmp_path):
    """1,000 jobs through every kind of fault: none lost, none ended twice, the bill agrees to the call."""
    numbers = tmp_path / "found.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--seconds",
        "60",
        "--json",
        str(numbers),
        "--folder",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=480)
    told = done.stdout + done.stderr
    assert done.returncode in (0, 1), told

    [found] = json.loads(numbers.read_text())["outcomes"]
    assert found["jobs"] == 1_000
    broken = {check["promise"] for check in found["checks"] if not check["kept"]}
    assert not {name for name in broken if not name.startswith("jobs of a killed worker run again within")}, told
    seconds = [one["seconds"] for one in found["findings"]["recoveries"]]
    assert len(seconds) > 0
    assert max(seconds) < BUSY_RECOVERY_SECONDS, told
    assert done.returncode == int(bool(broken)), told
    assert {fault["kind"] for fault in found["faults"]} == {kind.name.lower() for kind in faults.Kind}
    assert sum(found["billed"].values()) > 800


def test_ctrl_c_ends_everything_it_has_started(tmp_path, until):
    """Interrupted in the middle, the bench leaves no worker and no Redis behind."""
    command = [sys.executable, str(SCRIPT), "--seconds", "60", "--folder", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as bench:
        logs = tmp_path / "attune"
        until(lambda: any(" ready." in log.read_text(errors="replace") for log in logs.glob("*.log")))
        started = psutil.Process(bench.pid).children(recursive=True)
        assert len(started) > 4
        bench.send_signal(signal.SIGINT)
        assert bench.wait(60) == 1
    assert psutil.wait_procs(started, timeout=60)[1] == []


# --- what the checks notice ---


def test_lost_job_is_noticed():
    """A job that is still under way in the end, or unknown, breaks the promise."""
    assert checks.all_ended({"a": DONE, "b": FAILED}).kept
    assert not checks.all_ended({"a": DONE, "b": RUNNING}).kept
    assert not checks.all_ended({"a": DONE, "b": JobStatus.UNKNOWN}).kept


def test_job_that_ended_twice_is_noticed():
    """So is an end that was never written, and one of a job that nobody submitted."""
    assert checks.ended_once({"a": DONE, "b": RUNNING}, {"a": 1}).kept
    assert not checks.ended_once({"a": DONE}, {"a": 2}).kept
    assert not checks.ended_once({"a": DONE}, {}).kept
    assert not checks.ended_once({"a": DONE}, {"a": 1, "stranger": 1}).kept


def test_wrong_answer_is_noticed():
    """An answer to another prompt, or none, breaks the promise."""
    right = checks.Answer("a", "yes", "yes")
    assert checks.answers_are_right([right]).kept
    assert not checks.answers_are_right([right, checks.Answer("b", "yes", "no")]).kept
    assert not checks.answers_are_right([checks.Answer("b", None, "no")]).kept


def test_passed_budget_is_noticed():
    """Whether by its own counter or by the bill; a budget that refused nobody was not put to the test."""
    limit, less, more = Decimal("0.5"), Decimal("0.4"), Decimal("0.6")
    assert checks.budget_is_kept(limit, limit, less, refused=1).kept
    assert not checks.budget_is_kept(limit, more, less, refused=1).kept
    assert not checks.budget_is_kept(limit, less, more, refused=1).kept
    assert not checks.budget_is_kept(limit, less, less, refused=0).kept


def test_late_recovery_is_noticed():
    """Jobs of a killed worker run again in time, also where Redis was away meanwhile, and some were put to the test."""
    in_time = checks.Recovery("a", "w", 12.0)
    assert checks.recovered_in_time([in_time, checks.Recovery("b", "w", 19.0, redis_away=True)]).kept
    assert not checks.recovered_in_time([in_time, checks.Recovery("b", "w", 20.5)]).kept
    assert not checks.recovered_in_time([in_time, checks.Recovery("b", "w", None)]).kept
    assert not checks.recovered_in_time([checks.Recovery("b", "w", 30.0, redis_away=True)]).kept


def test_call_made_twice_without_a_reason_is_noticed():
    """One that a fault explains is not."""
    explained = checks.Extra("a", "1", "its worker was killed")
    assert checks.extras_are_explained([explained]).kept
    assert not checks.extras_are_explained([explained, checks.Extra("b", "2", None)]).kept


def test_difference_between_ledger_and_bill_is_noticed():
    """A call that one side lacks, or has at another price; and an uncertain one billed beyond its estimate."""
    known, unsure = record("1", cost="0.002"), record("2", outcome="orphaned", estimate="0.01")
    lines = [line("1", "0.002"), line("2", "0.003")]
    assert bill.bill_agrees([known, unsure], lines).kept
    assert bill.bill_agrees([known, unsure], lines[:1]).kept  # nobody knows whether the provider charged for it
    assert not bill.bill_agrees([unsure], lines).kept
    assert not bill.bill_agrees([known, unsure], lines[1:]).kept
    assert not bill.bill_agrees([known, unsure], [line("1", "0.0021"), lines[1]]).kept
    assert not bill.bill_agrees([known, unsure], [lines[0], line("2", "0.02")]).kept
    assert not bill.bill_agrees([known, unsure], [*lines, line("1", "0.002")]).kept


KILLED = {"how": "killed", "ended": 500}
TOLD = {"how": "told to end, exit code 0", "told": 490, "ended": 500}
STOPPED = {"stops": [(495, 520)]}
RESTARTED, PAUSED = [(499, 501)], [(505, 525)]


@pytest.mark.parametrize(
    ("outcome", "error", "fate", "times", "away", "explained"),
    [
        ("orphaned", None, KILLED, (490, 511, 511), [], True),
        ("orphaned", None, KILLED, (90, 100, 100), [], False),  # it was alive for 400 s more
        ("orphaned", None, KILLED, (490, 499, 499), [], False),
        ("orphaned", None, KILLED, (490, 540, 540), [], False),  # and this is too late to be its doing
        ("orphaned", None, KILLED, (490, 540, 540), PAUSED, True),
        ("orphaned", None, KILLED, (490, 550, 550), PAUSED, False),
        ("orphaned", None, STOPPED, (490, 521, 506), [], True),
        ("orphaned", None, STOPPED, (90, 100, 100), [], False),
        ("orphaned", None, STOPPED, (600, 611, 611), [], False),
        ("orphaned", None, TOLD, (490, 511, 511), RESTARTED, True),
        ("orphaned", None, TOLD, (490, 511, 511), [], False),
        ("orphaned", None, TOLD, (90, 100, 100), RESTARTED, False),
        ("failed", "stopped", TOLD, (485, 500, None), [], True),
        ("failed", "stopped", TOLD, (85, 100, None), [], False),
        ("failed", "stopped", {}, (485, 500, None), [], False),
        ("failed", "timeout", {}, (480, 500, None), [], True),
        ("succeeded", None, KILLED, (495, 499, 511), [], True),
        ("succeeded", None, KILLED, (495, 499, None), [], False),
        ("succeeded", None, KILLED, (90, 100, 511), [], False),  # its end had 400 s to be written
        ("succeeded", None, KILLED, (90, 100, 111), [], False),
        ("succeeded", None, STOPPED, (494, 521, 506), [], True),
        ("succeeded", None, STOPPED, (90, 100, 506), [], False),
        ("succeeded", None, STOPPED, (494, 521, 480), [], False),
        ("succeeded", None, TOLD, (490, 499, 511), RESTARTED, True),
        ("succeeded", None, TOLD, (490, 499, 511), [], False),
        ("succeeded", None, TOLD, (90, 100, 511), RESTARTED, False),
        ("succeeded", None, {}, (490, 499, 511), [], False),
    ],
)
def test_second_call_needs_a_fault_that_its_first_one_met(outcome, error, fate, times, away, explained):
    """What happened to its worker long before or after the call explains no second one; ``times``: began to lost."""
    call = extras.Call([record("1", outcome=outcome, error=error)], fleet.Life("w", 1, 0.0, **fate), *times)
    assert (extras.reason(call, extras.Faults(away)) is not None) is explained


def test_second_call_is_looked_up_in_bill_ledger_and_journal():
    """Two served calls of one job: the first is explained by the loss of the very worker that made it, then."""
    assert wasted(lost_lease="h:7:x", after_seconds=12, answering="2") == [("1", True)]
    assert wasted(lost_lease="h:7:x", after_seconds=60, answering="2") == [("1", False)]
    assert wasted(lost_lease="h:8:y", after_seconds=12, answering="2") == [("1", False)]


def test_call_that_gave_no_answer_is_the_wasted_one_even_if_it_was_the_later_one():
    """A worker may be stopped between leave for its call and the call: that comes after all others, and in vain."""
    assert wasted(lost_lease="h:7:x", after_seconds=12, answering="1") == [("2", False)]
    assert wasted(lost_lease="h:8:y", after_seconds=42, answering="1") == [("2", True)]


def wasted(*, lost_lease, after_seconds, answering):
    """Return the call of one job that was made in vain, and whether that is explained.

    Call 1 was made by h:7:x at 0 s, and call 2 by h:8:y 30 s later; both of these were killed 1 s after it.
    """
    began, later = NOW.timestamp(), NOW + timedelta(seconds=30)
    written = [record("1", cost="0.001"), replace(record("2", cost="0.001"), time=later, written=later)]
    bill_lines = [line("1", "0.001"), line("2", "0.001") | {"time": later.timestamp()}]
    calls = {"1": journal.Admitted("job", "h:7:x", began), "2": journal.Admitted("job", "h:8:y", later.timestamp())}
    lives = [fleet.Life("w7", 7, 0.0, ended=1.0, how="killed"), fleet.Life("w8", 8, 0.0, ended=31.0, how="killed")]
    seen = contenders.Seen(lives, journal.Journal(calls=calls), bill_lines, [], [], began)
    at = f"{NOW + timedelta(seconds=after_seconds):%Y-%m-%dT%H:%M:%SZ}"
    attempt = Attempt(
        model_id="m", provider="p", tier="cheap", outcome="succeeded", latency_ms=1, cost_usd=None, call_id=answering
    )
    result = JobResult(job_id="job", status=DONE, content="yes", attempts=(attempt,))
    ended = Record(
        "job", DONE, result=result.model_dump_json(), lost=(f"{at} worker {lost_lease} was lost; no call was open",)
    )
    return [(one.call_id, one.why is not None) for one in extras.extras(seen, written, {"job": ended})]


def test_worker_that_ends_by_itself_is_noticed():
    """So is one that has to be killed because it does not end when told."""
    good = [fleet.Life("a", 1, 0.0, how="killed"), fleet.Life("b", 2, 0.0, how="told to end, exit code 0")]
    assert checks.workers_end_when_told(good).kept
    for how in (f"{fleet.BY_ITSELF} with exit code 1", fleet.DID_NOT_END):
        assert not checks.workers_end_when_told([*good, fleet.Life("c", 3, 0.0, how=how)]).kept


def record(call_id, *, outcome="succeeded", cost=None, estimate=None, error=None):
    return LedgerRecord(
        call_id=call_id,
        job_id="job",
        tenant=None,
        workflow="w",
        stage="s",
        provider="anthropic",
        model_id="claude-haiku-4-5",
        tier="cheap",
        mode="api",
        outcome=outcome,
        error=error,
        cost_usd=None if cost is None else Decimal(cost),
        estimate_usd=None if estimate is None else Decimal(estimate),
        input_tokens=1,
        output_tokens=1,
        cache_read_tokens=0,
        cache_write_tokens=0,
        latency_ms=1,
        status=None,
        request_id=None,
        time=NOW,
        written=NOW,
    )


def line(call_id, cost):
    return {
        "client_request_id": call_id,
        "request_id": f"req-{call_id}",
        "time": NOW.timestamp(),
        "model": "claude-haiku-4-5",
        "outcome": "succeeded",
        "usage": {"input_tokens": 1, "output_tokens": 1},
        "cost_usd": cost,
    }


# --- what the bench sees by ---


def test_journal_counts_every_end_across_a_restart(tmp_path):
    """Ends of jobs and of Celery's tasks, admitted calls and the peak of a budget, before and after a restart."""
    server = EmbeddedRedis(tmp_path, configuration=journal.CONFIGURATION)
    server.start()
    try:
        with Redis.from_url(server.url) as redis:
            redis.hset("{chaos:01}:job:a", mapping={"state": "running", "fence": 1})
            redis.eval("redis.call('HSET', KEYS[1], 'state', 'failed', 'ended_ms', 1)", 1, "{chaos:01}:job:a")
            redis.hset("{chaos}:budget:t:*:*:month", "2026-11:spent", 7)
            redis.hset("{chaos}:budget:t:*:*:month", "2026-11:spent", 5)
            redis.hset("{chaos}:call:c", mapping={"job": "a", "lease": "h:1:x", "admitted_ms": 2500})
            redis.set("celery-task-meta-t", json.dumps({"status": "STARTED"}), ex=60)
            redis.execute_command("SETEX", "celery-task-meta-t", 60, json.dumps({"status": "SUCCESS"}))
        server.stop()
        server.start()
        with Redis.from_url(server.url) as redis:
            redis.hset("{chaos:01}:job:a", "state", "succeeded")
    finally:
        server.stop()

    found = journal.Journal.of(journal.commands_in(tmp_path))
    assert found.ends == {"a": 2, "t": 1}
    assert list(found.peaks.values()) == [7]
    assert found.calls == {"c": journal.Admitted("a", "h:1:x", 2.5)}


def test_plan_follows_from_the_seed_and_leaves_no_kind_out():
    """Every kind of fault happens in the short form, whatever the seed, and Redis is never taken away twice at once."""
    for seed in range(20):
        planned = faults.plan(seed, 45)
        assert planned == faults.plan(seed, 45)
        assert {fault.kind for fault in planned} == set(faults.Kind)
        for earlier, later in itertools.pairwise(planned):
            if earlier.kind in faults.REDIS_AWAY:
                assert earlier.at_seconds + earlier.lasts_seconds < later.at_seconds
    assert faults.plan(1, 45) != faults.plan(2, 45)


@pytest.fixture
def echo():
    """Run a server that sends everything back."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection):
        with connection, suppress(ConnectionResetError):
            while data := connection.recv(1000):
                connection.sendall(data)

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,)).start()

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def test_proxy_passes_on_until_it_cuts(echo):
    """Both ends of every connection are reset at once, and the next connection is passed on as before."""
    with tcp_proxy.TcpProxy(echo) as proxy:
        connections = [socket.create_connection(("127.0.0.1", proxy.port), timeout=60) for _ in range(3)]
        for connection in connections:
            connection.sendall(b"hello")
            assert connection.recv(100) == b"hello"
        assert proxy.cut() == 3
        for connection in connections:
            with connection, pytest.raises(ConnectionResetError):
                connection.recv(100)
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=60) as connection:
            connection.sendall(b"again")
            assert connection.recv(100) == b"again"
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b""


def test_proxy_hangs_up_when_there_is_nothing_behind_it():
    """A server that is down is down through the proxy, too."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with (
        tcp_proxy.TcpProxy(port) as proxy,
        pytest.raises(ConnectionResetError),
        socket.create_connection(("127.0.0.1", proxy.port), timeout=60) as connection,
    ):
        connection.recv(100)


def test_jobs_of_a_killed_bare_worker_are_found_lost(tmp_path, until):
    """Celery acknowledges early by default: what ran in a worker that is killed never runs again."""
    orders = contenders.make_orders(1, 4)
    server = EmbeddedRedis(tmp_path / "redis", configuration=journal.CONFIGURATION)
    with server, Simulator(Profile(latency=FixedLatency(seconds=60))) as provider:
        services = contenders.Services(server.url, server.url, provider.url, tmp_path, faults.SHORT, orders)
        contender = bare.BareCelery(services, late=False)
        workers = fleet.Fleet(1, contender.worker, tmp_path)
        try:
            workers.wait_until_ready()
            contender.submit(orders)
            until(lambda: provider.requests()["in_flight"] == 4)
            contender.killed(workers.kill(0))
            workers.wait_until_ready()
            assert contender.ended() == 0
        finally:
            workers.kill_all()
        commands = journal.commands_in(server.folder)
        seen = contenders.Seen(
            workers.lives, journal.Journal.of(commands), provider.invoice()["calls"], (), (), time.time()
        )
        found = contender.findings(seen)
        contender.close()

    kept = {check.promise: check.kept for check in found.checks}
    assert not kept["every accepted job ends"]
    assert [one.seconds for one in found.recoveries] == [None] * 4
