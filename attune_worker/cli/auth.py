"""``attune-worker auth``: is work paid for out of a subscription or by the token, and who decided that?

Each command is a function too (``cmd_auth_…``), which takes what the command takes and returns its exit code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from attune_worker.cli import credentials
from attune_worker.cli.auth_answers import ASSUMED, LEARNED, MODES, PLANS, asked, fields_of
from attune_worker.cli.auth_view import print_recommended, print_saved, print_status, shown_fields
from attune_worker.cli.output import console, json_option, print_json
from attune_worker.cli.printable import printable
from attune_worker.errors import AttuneError, ConfigurationError, ServiceUnavailableError
from attune_worker.jobs import AuthMode
from attune_worker.models.auth import AuthStrategy, Multiplier, SubscriptionTier
from attune_worker.models.auth_current import get_auth_strategy
from attune_worker.models.auth_store import auth_store
from attune_worker.models.learned_lines import ENOUGH_JOBS, LearnedLines
from attune_worker.models.source_lines import count_lines_of_code
from attune_worker.settings import get_settings

USAGE = 2

NO_SUBSCRIPTION = "no provider has a subscription in these settings, so all jobs go by api"


@click.group()
def auth() -> None:
    """Decide whether work is paid for out of a subscription or by the token.

    Example: attune-worker auth recommend src/app.py
    """


@auth.command()
@click.option("--tier", type=click.Choice(PLANS), help="The plan that is paid for.")
@click.option("--mode", type=click.Choice(MODES), help="auto: by size. The others: always.")
@click.option("--small", type=int, metavar="LINES", help="Fewer go by the subscription.")
@click.option("--medium", type=int, metavar="LINES", help="As many and more go by the token.")
@click.option(
    "--prefer-subscription/--no-prefer-subscription", default=None, help="What those in between go by. Default: do."
)
@click.option("--tokens-per-line", metavar="NUMBER", help=f"For estimates; {LEARNED}: what jobs have really used.")
@click.option(
    "--window-tokens", metavar="NUMBER", help=f"The plan's quota in five hours, for estimates; {ASSUMED}: a guess."
)
@json_option
def setup(**options: Any) -> None:
    """Set the strategy, and keep it in its file or in Redis. What is not named stays as it is.

    At a terminal, and without options, it asks.

    Example: attune-worker auth setup --tier max --small 800 --medium 3000
    """
    _exit(_setup(**options))


@auth.command()
@json_option
def status(*, as_json: bool) -> None:
    """Show the strategy, and how each provider's keys and subscriptions stand: refused, held up, or free.

    Exit code 3: Redis cannot be reached. What is known without it is shown all the same: the strategy, where it is kept
    in a file, and which keys are there.

    Example: attune-worker auth status --json
    """
    _exit(_status(as_json=as_json))


@auth.command()
@click.argument("file", required=False)
@click.option("--lines", type=int, metavar="N", help="Lines of code, instead of a file.")
@click.option("--model", metavar="ID", help="The model to estimate with. Default: the preferred capable one.")
@json_option
def recommend(file: str | None, lines: int | None, model: str | None, as_json: bool) -> None:
    """Say which mode a file, or so many lines of code, should go by, why, and what each would take.

    Example: attune-worker auth recommend --lines 1200
    """
    _exit(_recommend(file, lines, model, as_json=as_json))


@auth.command()
@click.option("--confirm", is_flag=True, help="Do it. Without it, say what would be lost.")
@click.option("--key", metavar="PROVIDER/NAME", help="Leave the strategy alone, and have this refused key tried again.")
@json_option
def reset(*, confirm: bool, key: str | None, as_json: bool) -> None:
    """Forget the strategy, so that the defaults hold again; or, with --key, that a provider has refused a key.

    The next call tries that key again. Nothing is lost by it, so it needs no --confirm. `auth status` names the keys.

    Exit code 2: it was not confirmed, or there is no such key.

    Example: attune-worker auth reset --key anthropic/default
    """
    _exit(_reset(confirm=confirm, key=key, as_json=as_json))


def cmd_auth_setup(
    *,
    tier: SubscriptionTier | str | None = None,
    mode: AuthMode | str | None = None,
    small: int | None = None,
    medium: int | None = None,
    prefer_subscription: bool | None = None,
    tokens_per_line: float | str | None = None,
    window_tokens: int | str | None = None,
    as_json: bool = False,
) -> int:
    """Do what ``attune-worker auth setup`` does, and return its exit code. None: it stays as it is."""
    return _code(
        lambda: _setup(
            tier=tier,
            mode=mode,
            small=small,
            medium=medium,
            prefer_subscription=prefer_subscription,
            tokens_per_line=tokens_per_line,
            window_tokens=window_tokens,
            as_json=as_json,
        )
    )


def cmd_auth_status(*, as_json: bool = False) -> int:
    """Do what ``attune-worker auth status`` does, and return its exit code: 3 where Redis is away."""
    return _code(lambda: _status(as_json=as_json))


def cmd_auth_recommend(
    file: Path | str | None = None, *, lines: int | None = None, model: str | None = None, as_json: bool = False
) -> int:
    """Do what ``attune-worker auth recommend`` does, and return its exit code: 2 with neither file nor lines."""
    return _code(lambda: _recommend(file, lines, model, as_json=as_json))


def cmd_auth_reset(*, confirm: bool = False, key: str | None = None, as_json: bool = False) -> int:
    """Do what ``attune-worker auth reset`` does, and return its exit code: 2 where it was not confirmed."""
    return _code(lambda: _reset(confirm=confirm, key=key, as_json=as_json))


def _setup(*, as_json: bool, **options: Any) -> int:
    with closing(auth_store(get_settings())) as store:
        saved = store.read()
        strategy = AuthStrategy() if saved is None else AuthStrategy.from_json(saved.raw, store.place)
        given = {name: value for name, value in options.items() if value is not None}
        if not given and not _at_terminal():
            raise ConfigurationError(
                "auth setup: there is no terminal to ask at; say what to set, such as --tier max (auth setup --help)"
            )
        changed = AuthStrategy(**dict(strategy) | (fields_of(given) if given else asked(strategy)))
        store.write(changed.to_json().encode())
    if as_json:
        print_json({"store": store.kind, "place": store.place, "strategy": changed.model_dump(mode="json")})
    else:
        print_saved(console(), changed, store.place)
    return 0


def _status(*, as_json: bool) -> int:
    settings = get_settings()
    with closing(auth_store(settings)) as store, closing(LearnedLines(settings)) as lines:
        saved = store.read()
        strategy = AuthStrategy() if saved is None else AuthStrategy.from_json(saved.raw, store.place)
        try:
            learned, away = lines.read(), None
        except ServiceUnavailableError as error:  # the strategy itself may be in a file
            learned, away = None, error.message
    statuses, unknown = credentials.look(settings, away)
    enough = learned is not None and learned.jobs >= ENOUGH_JOBS
    multiplier = strategy.multiplier()
    if learned is not None and enough and multiplier.source == "default":
        multiplier = Multiplier(learned.tokens_per_line, "learned", learned.jobs)
    known = {
        "store": store.kind,
        "place": store.place,
        "saved": saved is not None,
        "strategy": strategy.model_dump(mode="json"),
        "tokens_per_line": {
            "value": round(multiplier.tokens_per_line, 3),
            "source": multiplier.source,
            "learned": None if learned is None else round(learned.tokens_per_line, 3),
            "jobs": None if away is not None else 0 if learned is None else learned.jobs,
            "jobs_needed": ENOUGH_JOBS,
            "error": away,
        },
        "window_tokens": {
            "value": strategy.quota_window(),
            "source": "set" if strategy.window_tokens else ASSUMED if strategy.quota_window() else "unknown",
        },
        "credentials": credentials.as_values(statuses, unknown),
        "credentials_error": unknown,
    }
    if as_json:
        print_json(known)
    else:
        on = console()
        print_status(on, strategy, known)
        if not _subscribed():
            click.echo(NO_SUBSCRIPTION)
        credentials.print_credentials(on, statuses, unknown)
    return 0 if unknown is None else ServiceUnavailableError.exit_code


def _recommend(file: Path | str | None, lines: int | None, model: str | None, *, as_json: bool) -> int:
    if (file is None) == (lines is None):
        raise ConfigurationError("auth recommend: give either a file or --lines N")
    counted = count_lines_of_code(file) if file is not None else lines
    strategy = get_auth_strategy()
    found = strategy.get_pros_cons(counted or 0, model=model)
    if as_json:
        print_json({"file": None if file is None else str(file), **found})
    else:
        print_recommended(console(), found, None if file is None else str(file))
        if found["recommendation"] is AuthMode.SUBSCRIPTION and not _subscribed():
            click.echo(NO_SUBSCRIPTION)
    return 0


def _subscribed() -> bool:
    """Whether any provider has a subscription, be its token here or only with the workers."""
    return any(one.mode == "subscription" for those in get_settings().providers.values() for one in those.credentials)


def _reset(*, confirm: bool, key: str | None, as_json: bool) -> int:
    if key is not None:
        credentials.reset_key(get_settings(), key, as_json=as_json)
        return 0
    with closing(auth_store(get_settings())) as store:
        saved = store.read()
        lost = None if saved is None else _lost(saved.raw, store.place)
        if lost is None:
            _say_reset(as_json, f"nothing is kept in {store.place}: the defaults hold", reset=False, lost=None)
            return 0
        told = ", ".join(f"{name} = {value}" for name, value in lost.items()) or "only values that are the defaults"
        if not confirm and not (_at_terminal() and _confirmed(f"{store.place} holds {told}. Forget it?")):
            _say_reset(as_json, f"this would be lost: {told}; to forget it, give --confirm", reset=False, lost=lost)
            return USAGE
        store.clear()
    _say_reset(as_json, f"forgotten: {told}; the defaults hold", reset=True, lost=lost)
    return 0


def _lost(raw: bytes, place: str) -> dict[str, Any]:
    """Return what a strategy has that the defaults have not; one that cannot be read can be forgotten, too."""
    try:
        return shown_fields(AuthStrategy.from_json(raw, place))
    except ConfigurationError as error:
        return {"unreadable": error.message}


def _say_reset(as_json: bool, text: str, *, reset: bool, lost: Mapping[str, Any] | None) -> None:
    if as_json:
        print_json({"reset": reset, "lost": lost})
    else:
        click.echo(printable(text))


def _at_terminal() -> bool:
    streams = (sys.stdin, sys.stderr)  # either is None where it is closed, as by <&-
    return all(one is not None and not one.closed and one.isatty() for one in streams)


def _confirmed(question: str) -> bool:
    return click.confirm(printable(question), default=False, err=True)


def _code(command: Callable[[], int]) -> int:
    """Return a command's exit code, and say what went wrong as the command line would."""
    try:
        return command()
    except AttuneError as error:
        click.echo(f"Error: {printable(error, lines=True)}", err=True)
        return error.exit_code
    except click.Abort:
        click.echo("Aborted!", err=True)
        return 1


def _exit(code: int) -> None:
    if code:
        raise click.exceptions.Exit(code)
