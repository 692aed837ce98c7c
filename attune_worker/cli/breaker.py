"""``attune-worker breaker``: which providers are left alone, since when and why, and who decides otherwise?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

import click

from attune_worker.cli.circuit_view import CircuitView, label, print_circuits
from attune_worker.cli.names import complete_providers, complete_tiers, operator
from attune_worker.cli.number import Number
from attune_worker.cli.output import console, json_option, print_json
from attune_worker.cli.printable import printable
from attune_worker.jobs import ModelTier
from attune_worker.models.breaker import LONGEST_HOLD_SECONDS, CircuitBreaker, Override
from attune_worker.settings import get_settings
from attune_worker.store.circuits import MAX_REASON_CHARACTERS, Name

KINDS: dict[str, Override | None] = {
    "open": "open",
    "disabled": "disabled",
    "metrics-only": "metrics_only",
    "none": None,
}
"""What can be laid over a circuit, as it is typed."""


class _Reason(click.ParamType[str]):
    """Why; no longer than Redis keeps it."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if len(value) > MAX_REASON_CHARACTERS:
            self.fail(f"it has {len(value)} characters; allowed: {MAX_REASON_CHARACTERS}", param, ctx)
        return value


_provider = click.argument("provider", shell_complete=complete_providers)
_tier = click.argument("tier", required=False, shell_complete=complete_tiers)
_reason = click.option("--reason", type=_Reason(), default="", help="Why; kept with who and when.")
_seconds = click.option(
    "--seconds",
    type=Number(min=0, min_open=True, max=LONGEST_HOLD_SECONDS),
    metavar="N",
    help="How long.  [default: until it is reset]",
)


@click.group()
def breaker() -> None:
    """See which providers the fleet leaves alone, and steer that.

    There is a circuit for each provider and tier, and one for each provider, written provider:*, which is asked too.
    What is done here is obeyed from the next call on; calls under way end as they would.

    Example: attune-worker breaker status
    """


@breaker.command()
@click.argument("provider", required=False, shell_complete=complete_providers)
@json_option
def status(provider: str | None, as_json: bool) -> None:
    """Show each circuit of which something is known: its state, failures, since when, why, and the next probe.

    Looking changes nothing: a circuit whose time is up is open until a call asks.

    Example: attune-worker breaker status anthropic
    """
    with _breaker() as found:
        if provider is not None:
            _check(found, provider, None)
        views = _views(found, provider)
    if as_json:
        print_json([view.to_json() for view in views])
    else:
        print_circuits(console(), views)


@breaker.command()
@click.option(
    "--interval",
    type=Number(0.05, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to look.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print a line of JSON for each circuit, and then for each change."
)
def watch(interval: float, as_json: bool) -> None:
    """Show the circuits as they change, until Ctrl-C.

    Redis has to answer at first. When it goes away later, that is shown, and it is tried on.

    Example: attune-worker breaker watch --interval 0.5
    """
    from attune_worker.cli.watching import watch_circuits

    with _breaker() as found:
        watch_circuits(lambda: _views(found, None), interval, as_json=as_json)


@breaker.command()
@_provider
@_tier
@_seconds
@_reason
@json_option
def trip(provider: str, tier: str | None, seconds: float | None, reason: str, as_json: bool) -> None:
    """Stop calls to a provider, or one of its tiers, for some time, after which one call probes it.

    Without --seconds calls are refused until it is reset.

    Example: attune-worker breaker trip anthropic premium --seconds 600 --reason "maintenance until noon"
    """
    with _breaker() as found:
        name = _check(found, provider, tier)
        found.trip(*name, seconds, reason, by=operator())
        _answer(found, name, as_json=as_json)


@breaker.command()
@click.argument("kind", type=click.Choice(list(KINDS)))
@_provider
@_tier
@_seconds
@_reason
@json_option
def override(kind: str, provider: str, tier: str | None, seconds: float | None, reason: str, as_json: bool) -> None:
    """Lay something over a circuit, which leaves the state below it alone; none lifts it.

    open refuses calls. disabled allows all and counts none. metrics-only allows all and counts them, but never opens.

    Example: attune-worker breaker override metrics-only openai cheap --seconds 3600 --reason "trying new rules"
    """
    with _breaker() as found:
        name = _check(found, provider, tier)
        found.override(*name, KINDS[kind], seconds=seconds, reason=reason, by=operator())
        _answer(found, name, as_json=as_json)


@breaker.command()
@click.argument("provider", required=False, shell_complete=complete_providers)
@_tier
@_reason
@json_option
def reset(provider: str | None, tier: str | None, reason: str, as_json: bool) -> None:
    """Close circuits, forget their failures, and lift what was laid over them: one, all of a provider, or all.

    New calls are made at once, and jobs that wait look again at once.

    Example: attune-worker breaker reset anthropic --reason "they have mended it"
    """
    with _breaker() as found:
        name = None if provider is None else _check(found, provider, tier)
        found.reset(provider, tier, reason=reason, by=operator())
        views = [one for one in _views(found, provider) if tier is None or (one.provider, one.tier) == name]
    if as_json:
        print_json([view.to_json() for view in views])
    else:
        click.echo(
            printable(f"closed: {', '.join(label(one.provider, one.tier) for one in views) or 'nothing was there'}")
        )


@contextmanager
def _breaker() -> Iterator[CircuitBreaker]:
    found = CircuitBreaker()
    try:
        yield found
    finally:
        found.close()


def _views(found: CircuitBreaker, provider: str | None) -> list[CircuitView]:
    return [CircuitView(*name, fields) for name, fields in found.circuits(provider).items()]


def _answer(found: CircuitBreaker, name: Name, *, as_json: bool) -> None:
    """Show the circuit as it is now."""
    views = [view for view in _views(found, name[0]) if (view.provider, view.tier) == name]
    if as_json:
        print_json(views[0].to_json() if views else None)
    else:
        print_circuits(console(), views)


def _check(found: CircuitBreaker, provider: str, tier: str | None) -> Name:
    """Return the circuit's name; one that nobody configured must be there already, or it is refused."""
    providers, tiers = list(get_settings().providers), [one.value for one in ModelTier]
    wrong = [
        (what, name, known)
        for what, name, known in (("provider", provider, providers), ("tier", tier, tiers))
        if name is not None and name not in known
    ]
    for what, name, known in wrong:
        there = any((provider, tier) == one or (tier is None and one[0] == provider) for one in found.circuits())
        problem = f"{name!r} is not a {what}; {what}s: {', '.join(sorted(known))}"
        if not there:
            close = get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise click.BadParameter(printable(f"{problem}.{hint}"), param_hint=f"'{what.upper()}'")
        click.echo(printable(f"warning: {problem}, but there is such a circuit in Redis"), err=True)
    return provider, tier
