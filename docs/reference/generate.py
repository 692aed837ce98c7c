"""What do the reference pages say of commands, settings, Redis keys and the JSON of jobs? What the code says.

    python -m docs.reference.generate           writes cli.md, settings.md, redis-keys.md and job-schema.json
    python -m docs.reference.generate --check   writes nothing; exit code 1 when one of them is out of date

Of ``settings.md`` and ``redis-keys.md`` only the tables are written, and the text around them stays. What a setting
means is written by hand, in the last column of ``settings.md``, and kept from there.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic.json_schema import models_json_schema

from attune_worker import Job, JobResult, Settings
from attune_worker.cli import attune
from attune_worker.sections import Section
from attune_worker.store import keys

FOLDER = Path(__file__).parent
PROGRAM = "attune-worker"
HEADING = re.compile(r"^#+ (.+)\n", re.MULTILINE)
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
CELL = re.compile(r"(?<!\\)\|")

CLI_INTRO = """# Commands

<!-- Written by docs/reference/generate.py from the commands themselves; make docs. -->

Each also runs as `celery -A attune_worker attune …`, and takes `-h` or `--help`. Exit codes: 0 done; 1 the work failed;
2 wrong usage or configuration; 3 a service cannot be reached. What `--json` prints has [a page of its own](json.md).
"""


class MissingError(Exception):
    """Something of the code has no place, or no meaning, in a page that is written by hand."""


def pages() -> dict[Path, str]:
    """Return the text that each page should have; raises ``MissingError``."""
    return {
        FOLDER / "cli.md": commands_page(attune),
        FOLDER / "settings.md": settings_page((FOLDER / "settings.md").read_text()),
        FOLDER / "redis-keys.md": keys_page((FOLDER / "redis-keys.md").read_text(), keys.__doc__ or ""),
        FOLDER / "job-schema.json": job_schema(),
    }


def commands_page(program: click.Command) -> str:
    """Return the page of a program's commands; it does not depend on the width of any terminal."""
    return "\n".join([CLI_INTRO, *_commands(program, click.Context(program, info_name=PROGRAM))])


def _commands(command: click.Command, ctx: click.Context) -> Iterator[str]:
    """Return a section for the command, and for each below it."""
    prose, examples = _help(command)
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    yield f"## {ctx.command_path}\n\n{prose}\n\n```text\n{usage}\n```\n"
    records = [
        one.get_help_record(ctx)
        for one in command.get_params(ctx)
        if isinstance(one, click.Option) and "--help" not in one.opts
    ]
    if options := [record for record in records if record is not None]:
        yield _table(["option", "meaning"], [[f"`{names}`", meaning] for names, meaning in options])
    if not isinstance(command, click.Group):
        if examples:
            yield "```bash\n" + "\n".join(examples) + "\n```\n"
        return
    below = [(name, command.get_command(ctx, name)) for name in command.list_commands(ctx)]
    found = [(name, one) for name, one in below if one is not None and not one.hidden]
    links = [[f"[`{name}`](#{_anchor(f'{ctx.command_path} {name}')})", _summary(one)] for name, one in found]
    yield _table(["command", ""], links)
    for name, one in found:
        yield from _commands(one, click.Context(one, info_name=name, parent=ctx))


def _help(command: click.Command) -> tuple[str, list[str]]:
    """Return what a command says of itself, and its examples."""
    prose, examples = [], []
    for paragraph in inspect.cleandoc(command.help or "").replace("\b\n", "").split("\n\n"):
        head, colon, rest = paragraph.partition(":")
        if colon and head in {"Example", "Examples"}:
            examples += [line.strip() for line in rest.splitlines() if line.strip()]
        else:
            prose.append(paragraph)
    return "\n\n".join(prose), examples


def _summary(command: click.Command) -> str:
    return command.get_short_help_str(limit=200)


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def settings_page(page: str) -> str:
    """Return the page of the settings with its tables written anew."""
    missing: list[str] = []
    for path, model in _tables(Settings):
        title = path[-1] if path else "General"
        try:
            page = _settings_table(page, [".".join(path), title], model)
        except MissingError as error:
            missing += error.args
    if missing:
        raise MissingError(*missing)
    return page


def _tables(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """Return the tables of attune.toml with their names, outer ones first."""
    yield path, model
    for name, field in model.model_fields.items():
        for section in _sections_in(field.annotation):
            yield from _tables(section, (*path, name))


def _sections_in(kind: Any) -> Iterator[type[Section]]:
    if isinstance(kind, type) and issubclass(kind, Section):
        yield kind
    for argument in get_args(kind):
        yield from _sections_in(argument)


def _settings_table(page: str, titles: Sequence[str], model: type[BaseModel]) -> str:
    """Return the page with the table below one of these headings written anew."""
    start, end = _table_below(page, titles)
    said = dict(_rows(page[start:end]))
    nested = [name for name, field in model.model_fields.items() if _is_table(field)]
    rows, missing = [], []
    for name, field in model.model_fields.items():
        if name in nested:
            continue
        if name not in said and not field.description:
            missing.append(
                f"settings.md, {titles[-1]}: `{name}` has no meaning; add the row | `{name}` | | what it is |"
            )
            continue
        cells = said.get(name, ["", "", field.description or ""])
        rows.append([f"`{name}`", _default(field) or cells[1] or "none", _allowed(field), cells[-1]])
    if missing:
        raise MissingError(*missing)
    if nested:
        rows.append([", ".join(f"`{name}`" for name in nested), "", "", "tables, see below"])
    return page[:start] + _table(["setting", "default", "allowed", "meaning"], rows) + page[end:]


def _table_below(page: str, titles: Sequence[str]) -> tuple[int, int]:
    """Return where the first table below a heading begins and ends; without one, it is where it should be."""
    headings = list(HEADING.finditer(page))
    for place, heading in enumerate(headings):
        if heading[1].strip("`[] ") in titles:
            after = headings[place + 1].start() if place + 1 < len(headings) else len(page)
            table = TABLE.search(page, heading.end(), after)
            return table.span() if table else (after, after)
    raise MissingError(f"there is no heading '## {titles[-1]}' for a table of the settings")


def _rows(table: str) -> Iterator[tuple[str, list[str]]]:
    """Return the rows of a table by the names in their first cells."""
    for line in table.splitlines()[2:]:
        cells = [cell.strip() for cell in CELL.split(line)[1:-1]]
        for name in re.findall(r"`(\w+)`", cells[0]):
            yield name, cells


def _is_table(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _default(field: FieldInfo) -> str | None:
    """Return a default as it stands in TOML, in words where it has none there; None: words have to be found by hand."""
    if field.is_required():
        return "required"
    value = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
    if isinstance(value, tuple):
        return ", ".join(f"`{one}`" for one in value if isinstance(one, str)) or None
    return None if callable(field.default_factory) else _value(value)


def _value(value: object) -> str:
    if value is None or value == "":
        return "none" if value is None else "empty"
    if isinstance(value, bool):
        return f"`{value}`".lower()
    return f"`{_number(value)}`" if isinstance(value, int | float | Decimal) else f"`{value}`"


def _allowed(field: FieldInfo) -> str:
    """Return in a few words what values there are; nothing where any text will do."""
    said = [_kind(kind) for kind in _parts(field.annotation)]
    limits = {type(one).__name__.lower(): one for one in field.metadata}
    patterns = [one.pattern for one in field.metadata if getattr(one, "pattern", None)]
    if patterns:
        return f"`{patterns[0].strip('^$')}`"
    words = ", ".join(dict.fromkeys(word for word in said if word))
    return f"{words}{_range({name: getattr(one, name) for name, one in limits.items() if name in _BOUNDS})}"


def _parts(kind: Any) -> list[Any]:
    """Return the kinds that a union is made of, without None and without what is laid over them."""
    if get_origin(kind) is Annotated:
        return _parts(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [part for one in get_args(kind) for part in _parts(one)]
    return [] if kind is NoneType else [kind]


def _kind(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in get_args(kind))
    if origin is not None:
        return "tables" if [*_sections_in(kind)] else "a list"
    if issubclass(kind, Enum):
        return ", ".join(f"`{one.value}`" for one in kind)
    named = {bool: "`true`, `false`", int: "whole number", float: "number", Decimal: "number", Path: "a path"}
    return named.get(kind, "")


_BOUNDS = ("gt", "ge", "lt", "le")


def _range(limits: Mapping[str, Any]) -> str:
    """Return bounds as they are said: ``, 1 to 20``, ``, over 0``."""
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    if low is not None and high is not None and limits.keys() <= {"ge", "le"}:
        return f", {_number(low)} to {_number(high)}"
    said = []
    if low is not None:
        said.append(f"over {_number(low)}" if "gt" in limits else f"{_number(low)} or more")
    if high is not None:
        said.append(f"{'under' if 'lt' in limits else 'up to'} {_number(high)}")
    return "".join(f", {one}" for one in said)


def _number(value: Any) -> str:
    return f"{value:.10g}"


def keys_page(page: str, described: str) -> str:
    """Return the page of the keys with its table written anew from the one in ``store/keys.py``."""
    table = re.search(r"^=[= ]+\n.+\n=[= ]+\n(.*?)^=[= ]+\n", described, re.MULTILINE | re.DOTALL)
    if table is None:
        raise MissingError("the docstring of store/keys.py holds no table")
    rows: list[list[str]] = []
    for line in table[1].splitlines():
        row = re.match(r"(\w+) +(\w+) +(``.+?``(?:, ``.+?``)*) *(.*)", line)
        if row:
            rows.append([*row.groups()])
        elif rows and line.startswith("  "):
            rows[-1][-1] = f"{rows[-1][-1]} {line.strip()}".strip()
        else:
            raise MissingError(f"store/keys.py: this row is not understood: {line}")
    start, end = _table_below(page, ["Redis keys"])
    cells = [[cell.replace("``", "`").replace("->", "→") for cell in row] for row in rows]
    return page[:start] + _table(["key", "type", "name", "lifetime"], cells) + page[end:]


def job_schema() -> str:
    """Return the JSON Schema of a job and, under ``$defs``, of its result."""
    _, schema = models_json_schema([(Job, "validation"), (JobResult, "serialization")], ref_template="#/$defs/{model}")
    shapes = schema["$defs"]
    for shape in shapes.values():
        if "description" in shape:
            shape["description"] = inspect.cleandoc(shape["description"]).replace("``", "`")
        _name_bounds(shape)
    shapes["Job"]["oneOf"] = [
        {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "messages": {"type": "null"}}},
        {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": {"type": "null"}}},
    ]
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A job of attune-worker, as submit_job takes it; its result is #/$defs/JobResult",
        "$ref": "#/$defs/Job",
        "$defs": shapes,
    }
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def _name_bounds(schema: Any) -> None:
    """Give bounds their names in JSON Schema where pydantic, behind a validator of ours, leaves its own."""
    if isinstance(schema, dict):
        for name in [name for name in schema if name in _SCHEMA_BOUNDS and not isinstance(schema[name], dict)]:
            schema[_SCHEMA_BOUNDS[name]] = schema.pop(name)
    for below in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _name_bounds(below)


_SCHEMA_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "decimal_places": "x-decimal-places",
}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(map(_cell, line))} |" for line in (head, *rows)]
    lines.insert(1, f"|{'---|' * len(head)}")
    return "".join(re.sub(r"\|  (?=\|)", "| ", line) + "\n" for line in lines)


def _cell(text: str) -> str:
    return CELL.sub(r"\|", " ".join(text.split()))


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or check them; return the exit code."""
    try:
        wanted = pages()
    except MissingError as error:
        print(*error.args, sep="\n", file=sys.stderr)
        return 1
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" not in arguments:
        for path in stale:
            path.write_text(wanted[path])
            print(f"written: {path.name}")
        return 0
    for path in stale:
        print(f"docs/reference/{path.name} is out of date: run make docs", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
