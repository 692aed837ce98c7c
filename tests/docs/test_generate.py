import json
import os
import re
import subprocess
import sys

import click
import pytest
from pydantic import Field

from attune_worker.cli import attune
from attune_worker.sections import Section
from docs.reference import generate
from tests.examples.stack import ROOT


def described(rows):
    """Return a docstring with that table of keys."""
    rule = "=====  ======  ====  ====\n"
    return f"Which?\n\n{rule}key    type    name  life\n{rule}{rows}{rule}\nMore.\n"


KEYS = "# Redis keys\n\nBefore.\n\n| key |\n|---|\n| old |\n\nAfter.\n"


@pytest.mark.parametrize("path", generate.pages(), ids=lambda path: path.stem)
def test_the_reference_is_what_the_code_says(path):
    """Commands, settings, keys and fields that are added, renamed or dropped: make docs."""
    assert path.read_text() == generate.pages()[path]


def test_the_pages_do_not_depend_on_the_terminal():
    """Whoever runs it, in whatever window, gets the same; --check only looks."""
    ran = subprocess.run(
        [sys.executable, "-m", "docs.reference.generate", "--check"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "31", "TERMINAL_WIDTH": "31"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_every_command_has_its_section_with_every_option():
    """However deep it is."""
    page = generate.commands_page(attune)

    def walk(command, path):
        text = page.partition(f"## {path}\n")[2].partition("\n## ")[0]
        assert text, path
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.opts[-1] in text, f"{path} {option.opts[-1]}"
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                walk(command.get_command(context, name), f"{path} {name}")

    walk(attune, "attune-worker")


def test_a_hidden_command_is_not_told():
    """Whoever hides one does not want it found."""
    program = click.Group(
        commands=[
            click.Command("seen", help="Look.\n\nExample: attune-worker seen"),
            click.Command("unseen", hidden=True),
        ]
    )
    page = generate.commands_page(program)
    assert "```bash\nattune-worker seen\n```" in page
    assert "unseen" not in page


class Knobs(Section):
    """A table of settings."""

    size: int = Field(default=3, ge=1, le=9)
    name: str | None = None


def test_the_meaning_of_a_setting_is_kept_and_the_rest_is_written_anew():
    """What stands around the table stays as it is; rows that the code does not have go."""
    page = (
        "# Settings\n\n## knobs\n\nBefore.\n\n| a | b | c |\n|---|---|---|\n| `gone` | | x |\n| `name` | | its name |\n"
    )
    page += "| `size` | `7` | how large |\n\n## after\n\n| `size` | not this |\n"
    written = generate._settings_table(page, ["knobs"], Knobs)
    assert written == (
        "# Settings\n\n## knobs\n\nBefore.\n\n| setting | default | allowed | meaning |\n|---|---|---|---|\n"
        "| `size` | `3` | whole number, 1 to 9 | how large |\n| `name` | none | | its name |\n\n"
        "## after\n\n| `size` | not this |\n"
    )
    assert generate._settings_table(written, ["knobs"], Knobs) == written


def test_a_setting_without_a_meaning_is_refused():
    """It says which row is missing where, or which heading."""
    page = "# Settings\n\n## knobs\n\n| a | b | c |\n|---|---|---|\n| `name` | | its name |\n"
    with pytest.raises(generate.MissingError, match=re.escape("settings.md, knobs: `size` has no meaning")):
        generate._settings_table(page, ["knobs"], Knobs)
    with pytest.raises(generate.MissingError, match="there is no heading '## knobs'"):
        generate._settings_table("# Settings\n", ["knobs"], Knobs)


def test_a_key_that_is_added_to_the_code_is_on_the_page():
    """With all lines of its lifetime, and several names."""
    rows = "one    hash    ``{ns}:a``, ``{ns}:b``\n                     for ever\n                     and a day\n"
    page = generate.keys_page(KEYS, described(f"{rows}two    zset    ``{{ns}}:c`` short\n"))
    assert page == (
        "# Redis keys\n\nBefore.\n\n| key | type | name | lifetime |\n|---|---|---|---|\n"
        "| one | hash | `{ns}:a`, `{ns}:b` | for ever and a day |\n| two | zset | `{ns}:c` | short |\n\nAfter.\n"
    )
    with pytest.raises(generate.MissingError, match="not understood: a line without names"):
        generate.keys_page(KEYS, described("a line without names\n"))


def test_the_schema_is_that_of_a_job_as_it_is_sent():
    """All fields of job and result, what is required, and that a text will do for stop."""
    schema = json.loads(generate.job_schema())
    job = schema["$defs"][schema["$ref"].rpartition("/")[2]]
    assert job["required"] == ["task_type"]
    assert job["additionalProperties"] is False
    assert {"string", "array"} <= {one["type"] for one in job["properties"]["stop"]["anyOf"]}
    [number] = [one for one in job["properties"]["max_cost"]["anyOf"] if "minimum" in one]
    assert (number["minimum"], number["maximum"]) == (0, 1_000_000)
    names = set(re.findall(r"#/\$defs/(\w+)", json.dumps(schema)))
    assert names <= set(schema["$defs"])
    assert "JobResult" in schema["$defs"]
