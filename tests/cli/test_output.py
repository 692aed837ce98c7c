import json
import unicodedata
from datetime import UTC, datetime
from decimal import Decimal
from io import StringIO

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from attune_worker.cli import attune
from attune_worker.cli.main import COMMANDS, Failure
from attune_worker.cli.output import Column, Rows, duration, moment, print_fitting, print_json, say
from attune_worker.cli.printable import printable
from attune_worker.errors import AttuneError

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202egnp.exe\u2028\udc80"
"""Retitles and clears a terminal, colours it in the eight-bit way, goes back over the line, and reverses letters."""


def commands(group, *above):
    """Yield the words of every command below a group, and the command."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*above, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *above, name)


@given(st.text(st.characters(codec=None, categories=None)))
def test_nothing_printable_is_obeyed_by_a_terminal(text):
    """Whatever comes from outside, no control or format character is left but the two that join letters."""
    left = {unicodedata.category(one) for one in printable(text) if one not in "\u200c\u200d"}
    assert not left & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    printable(text).encode()


def test_what_is_harmless_stays_as_it_is():
    """Letters of every script, emoji and, where they are wanted, line breaks and tabs."""
    assert printable("naïve 漢字 עברית 👩‍💻") == "naïve 漢字 עברית 👩‍💻"
    assert printable("a\n\tb", lines=True) == "a\n\tb"
    assert printable("a\nb") == r"a\nb"
    assert printable("\x1b[31m") == r"\x1b[31m"


def test_tables_and_lines_obey_nothing_that_is_in_them():
    """Neither the terminal's commands nor rich's markup, emoji and links: all of it is shown."""
    out = Console(width=200, force_terminal=True, color_system=None, file=StringIO())
    text = f"[bold]{HOSTILE}[link=x] :smile:"
    print_fitting(out, Rows([Column(text)], [[text]], title=text, footer=[text]))
    say(out, text)
    shown = out.file.getvalue()
    assert shown.count(printable(text)) == 5
    assert not any(one in shown for one in HOSTILE if not one.isprintable() and one != "\x1b")
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown


@pytest.mark.parametrize(("width", "columns"), [(20, "a"), (45, "a b"), (80, "a b c")])
def test_tables_leave_columns_out_and_cut_nothing_off(width, columns):
    """The columns of the highest rank go first, and the last one stays whatever its width."""
    out = Console(width=width, force_terminal=True, color_system=None, file=StringIO())
    rows = Rows([Column("a"), Column("b", 1), Column("c", 2)], [["x" * 25, "y" * 10, "z" * 10]])
    rank = print_fitting(out, rows)
    lines = out.file.getvalue().splitlines()
    assert next(line for line in lines if " a " in line).split() == columns.split()
    assert rank == len(columns.split()) - 1
    assert "x" * 25 in out.file.getvalue()
    assert "…" not in out.file.getvalue()


def test_json_is_ascii_with_exact_amounts_and_times_in_utc(capsys):
    """A terminal obeys nothing in it, and no amount goes through a float."""
    value = {"text": HOSTILE, "usd": Decimal("0.000000010"), "at": datetime(2026, 11, 23, tzinfo=UTC)}
    print_json(value)
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert printed.rstrip("\n").isprintable()
    assert json.loads(printed) == {"text": HOSTILE, "usd": "0.000000010", "at": "2026-11-23T00:00:00+00:00"}


def test_times_that_nobody_could_have_meant_are_no_times():
    """A garbled record is shown, not a traceback."""
    assert moment(10**18) is None
    assert moment(None) is None
    assert [duration(ms) for ms in (None, 12.4, 1500, 600_000, 9_000_000)] == ["", "12 ms", "1.5 s", "10 min", "2.5 h"]


def test_an_error_obeys_nothing_that_is_in_it():
    """A provider's words in an error reach the terminal of whoever runs a command; its lines stay lines."""
    told = Failure(AttuneError(f"worker ended:\n{HOSTILE}")).format_message()
    assert told == f"worker ended:\n{printable(HOSTILE)}"


def test_every_command_of_the_table_is_there():
    """A name in the table leads to a command."""
    assert {words[0] for words, _ in commands(attune)} == set(COMMANDS)
