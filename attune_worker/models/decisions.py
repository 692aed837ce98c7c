"""What decided about a call? One DEBUG line for each decision, with the constraint that decided it.

The lines name models, circuits, limits and budgets; there is nothing in them of what a job says, and no key.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from attune_worker.jobs import Candidate, Decision
from attune_worker.models.adaptive import Ranking
from attune_worker.models.auth import Recommendation
from attune_worker.models.calls import Charged, Permit, Quote, Refusal, Request, circuits_of
from attune_worker.models.refusals import OF_CIRCUITS, WHY, without_money
from attune_worker.models.registry import ModelInfo
from attune_worker.store.circuits import Grant, Name

logger = logging.getLogger(__name__)

MAX_REASONS = 4
"""So many reasons of models that were not chosen are told, the most frequent ones."""

_STATES = {
    b"open": "is open",
    b"probing": "is half-open, and another call probes it,",
    b"forced_open": "was opened by an operator,",
}


def wanted() -> bool:
    """Whether anybody reads the lines; ask first where one costs something to make."""
    return logger.isEnabledFor(logging.DEBUG)


def tell_route(
    job_id: str, ranking: Ranking, dropped: Iterable[tuple[ModelInfo, str]], *, adaptive: bool = True
) -> None:
    """Tell which model is asked first, why, and what spoke against the others."""
    if not wanted():
        return
    decision = ranking.decision
    chosen = decision.candidates[decision.chosen]
    behind = [one.verdict.partition(":")[0] for one in decision.candidates if one is not chosen]
    line = f"route of {_of(job_id)} in {_plain(decision.workflow)}/{_plain(decision.stage)}: "
    line += f"{chosen.provider}/{chosen.model_id}, {_because(decision, chosen, adaptive)}"
    for what, reasons in (("behind it", behind), ("dropped", [f"{one.provider} {why}" for one, why in dropped])):
        if reasons:
            line += f"; {what}: {_tally(reasons)}"
    logger.debug("%s", line)


def tell_mode(job_id: str, lines: int, recommended: Recommendation) -> None:
    """Tell what the auth strategy recommends for a job, and why."""
    mode, reason = recommended
    logger.debug("auth mode of %s, taken for %d lines: %s, because %s", _of(job_id), lines, mode, reason)


def tell_way(permit: Permit, constraint: str) -> None:
    """Tell by which credential a call goes, and why."""
    how = "a subscription" if permit.credential.subscription else "an API key"
    logger.debug(
        "auth of call %s to %s: %s, %s: %s", permit.call_id, permit.model.ref, permit.credential.name, how, constraint
    )


def tell_leave(
    request: Request, charged: Charged, permit: Permit, probes: bytes, passed_over: Sequence[Sequence[Any]]
) -> None:
    """Tell for which model there is leave, and why there was none for those before it."""
    if not wanted():
        return
    line = f"leave for {permit.model.ref}"
    circuits = dict(zip((b"tier", b"provider"), circuits_of(permit.model), strict=True))
    if probes in circuits:
        line += f", as a probe of circuit {_circuit(circuits[probes])}"
    if passed_over:
        line += f"; passed over: {_refused(request, charged, passed_over)}"
    logger.debug("call %s of %s: %s", permit.call_id, _of(request.job_id), line)


def tell_refusal(request: Request, charged: Charged, refusals: Sequence[Sequence[Any]]) -> None:
    """Tell why there is leave for none of the candidates, and until when."""
    if wanted():
        logger.debug("no leave for %s: %s", _of(request.job_id), _refused(request, charged, refusals))


def tell_own(request: Request, verdict: Permit | Refusal) -> None:
    """Tell what was decided without Redis, by what this process has seen."""
    if wanted():
        said = f"leave for {verdict.model.ref}" if isinstance(verdict, Permit) else f"no leave: {verdict.reason}"
        logger.debug("without Redis, for %s: %s", _of(request.job_id), said)


def tell_circuit(names: Sequence[Name], grant: Grant) -> None:
    """Tell which circuit refuses a call, or lets one through as a probe; a closed one is not worth a line."""
    if not wanted():
        return
    if not grant.allowed:
        state = _STATES.get(grant.reason.encode(), grant.reason)
        logger.debug("circuit %s %s for %.1f s more", _circuit(names[grant.place]), state, grant.wait_ms / 1000)
    for name, (_, probe) in zip(names, grant.permits, strict=False):
        if probe:
            logger.debug("circuit %s lets a probe through", _circuit(name))


def _because(decision: Decision, chosen: Candidate, adaptive: bool) -> str:
    if decision.rule == "pinned":
        return "the model that the job names"
    if decision.rule == "static":
        why = "nothing is known of the stage yet" if adaptive else "routing.adaptive is off"
        return f"the first in the static order: {why}"
    expected = "" if chosen.expected_success is None else f": {chosen.expected_success:.2f} of {decision.floor:.2f}"
    if decision.explored:
        why = f"explored, as {decision.propensity:.1%} of the jobs are"
    elif chosen.verdict == "chosen":
        why = f"the cheapest that meets the floor{expected}"
    else:
        why = chosen.verdict
    return f"{why}; best effort, none meets what is asked for" if decision.best_effort else why


def _refused(request: Request, charged: Charged, refusals: Sequence[Sequence[Any]]) -> str:
    known = zip(request.quotes, charged, refusals, strict=False)
    return "; ".join(f"{quote.model.ref}: {_lacking(quote, budgets, refusal)}" for quote, budgets, refusal in known)


def _lacking(quote: Quote, budgets: Sequence[Any], refusal: Sequence[Any]) -> str:
    kind, at, why, what, place = refusal
    if kind != b"wait":
        return without_money(quote, budgets[place], refusal)
    until = datetime.fromtimestamp(int(at) / 1000, UTC).isoformat(timespec="milliseconds")
    if why in OF_CIRCUITS:
        of_tier, of_provider = circuits_of(quote.model)
        return f"circuit {_circuit(of_provider if what == b'provider' else of_tier)} {_STATES[why]} until {until}"
    return f"{WHY.get(why, why.decode())} until {until}"


def _tally(reasons: Iterable[str]) -> str:
    counted = Counter(reasons).most_common()
    said = [f"{count} {reason}" for reason, count in counted[:MAX_REASONS]]
    rest = sum(count for _, count in counted[MAX_REASONS:])
    return ", ".join([*said, f"{rest} for other reasons"] if rest else said)


def _circuit(name: Name) -> str:
    provider, tier = name
    return f"{_plain(provider)}:{'*' if tier is None else _plain(tier)}"


def _of(job_id: str) -> str:
    return f"job {_plain(job_id)}" if job_id else "a call without a job"


def _plain(name: str) -> str:
    """Return a name from outside as it may stand in a line of a log."""
    return name if name.isprintable() else ascii(name)
