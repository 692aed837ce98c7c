from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from attune_worker import Attempt, AttuneError, Job, JobResult, JobStatus, Settings, TaskType, Usage, get_tier_for_task
from attune_worker.cli import attune
from attune_worker.jobs import JobError
from attune_worker.models.registry import Registry
from tests.examples.stack import EXAMPLES, PATIENCE_SECONDS, ROOT, Stack, running_stack

DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.stem}-{self.line}"


def blocks(language: str) -> list[Block]:
    """Return the blocks of a language in all pages."""
    found = ((page, text, match) for page in PAGES for text in [page.read_text()] for match in FENCE.finditer(text))
    return [
        Block(page, language, text.count("\n", 0, match.start()) + 1, match[2])
        for page, text, match in found
        if match[1] == language
    ]


def command_lines() -> list[str]:
    """Return every ``attune-worker …`` that a page tells its reader to type."""
    lines = [re.split(" [#>] ", line)[0].strip() for block in blocks("bash") for line in block.text.splitlines()]
    return sorted({line for line in lines if line.startswith("attune-worker ")})


def anchor(heading: str) -> str:
    """Return the fragment that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Redis, a simulated provider, and a worker that takes jobs."""
    with running_stack(tmp_path_factory.mktemp("docs")) as stack, stack.worker():
        yield stack


@pytest.mark.parametrize("page", sorted({block.page for block in blocks("python")}), ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(stack, page):
    """Each Python block runs as it stands, against a real worker, after the blocks above it."""
    script = "\n".join(block.text for block in blocks("python") if block.page == page)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=stack.folder,
        env=stack.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_example_of_feedback_moves_its_jobs(stack):
    """Jobs whose answers are judged go to a cheaper model once it has shown that it will do."""
    curious = {
        "ATTUNE_NAMESPACE": "curious",
        "ATTUNE_ROUTING__EXPLORATION": "0.5",
        "ATTUNE_ROUTING__REFRESH_SECONDS": "0.05",
    }
    with stack.worker(**curious):
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "feedback.py"), "200"],
            cwd=stack.folder,
            env={**stack.environ, **curious},
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=True,
        )
    first, *_, last = done.stdout.splitlines()
    assert "anthropic/claude-sonnet" in first
    assert last.split()[1].startswith("anthropic/claude-haiku")


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_every_configuration_loads(block, tmp_path):
    """Each TOML block is an attune.toml without an unknown key, and its models can be laid over the catalog."""
    file = tmp_path / "attune.toml"
    file.write_text(block.text)
    Registry.from_settings(Settings.load(file, {}))


@pytest.mark.parametrize("example", sorted((EXAMPLES / "config").glob("*.toml")), ids=lambda file: file.stem)
def test_configuration_examples_are_shown_as_they_are(example):
    """A page that shows an example's file shows all of it, unchanged."""
    assert example.read_text() in {block.text for block in blocks("toml")}


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_is_understood(line, monkeypatch, tmp_path):
    """The commands, options and arguments that a page tells its reader to type exist; so do files, for their sake."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    name, *arguments = shlex.split(line)
    for file in [Path(one) for one in arguments if re.fullmatch(r"(?!/)[\w/-]+\.\w+", one)]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    context = attune.make_context(name, arguments)
    command: click.Command = attune
    while isinstance(command, click.Group):
        _, found, rest = command.resolve_command(context, context._protected_args + context.args)
        assert found is not None
        command, context = found, found.make_context(found.name, rest, parent=context)


def test_command_lines_were_found():
    """The test above has something to look at."""
    assert len(command_lines()) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """Links between pages and to files of this repository are not broken, nor are their fragments."""
    for target in LINK.findall(page.read_text()):
        if target.startswith("http"):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if fragment:
            assert fragment in {anchor(heading) for heading in HEADING.findall(file.read_text())}, target


def test_every_page_is_in_the_index():
    """No page is left for its reader to stumble upon."""
    index = (DOCS / "index.md").read_text()
    assert all(str(page.relative_to(DOCS)) in index for page in DOCS.rglob("*.md") if page.name != "index.md")


def test_environment_variables_in_the_pages_are_settings():
    """Each ATTUNE_ variable that a page names is one that the settings know."""
    named = {name for page in PAGES for name in re.findall(r"\bATTUNE_[A-Z_]*[A-Z]\b", page.read_text())}
    known = {f"ATTUNE_{field.upper()}" for field in Settings.model_fields} | {"ATTUNE_CONFIG"}
    assert {name.partition("__")[0] for name in named} <= known


def log_texts() -> list[str]:
    """Return what the page about monitoring has operators look for in the log."""
    table = (DOCS / "howto/monitor.md").read_text().partition("| text | meaning |\n")[2]
    return [text for line in table.splitlines() for text in re.findall(r"`([^`]+)`", line.split("|")[1:2][0])]


@pytest.mark.parametrize("text", log_texts())
def test_what_is_to_be_looked_for_in_the_log_is_written_there(text):
    """Each stretch of it, between what stands for names and numbers, is in the code."""
    code = "\n".join(file.read_text() for end in ("py", "lua") for file in (ROOT / "attune_worker").rglob(f"*.{end}"))
    stretches = [stretch.strip(" :,;") for stretch in re.split(r"…|\bN\b", text)]
    assert [stretch for stretch in stretches if stretch not in code] == []


def section(title: str) -> str:
    """Return the text of a section of the reference of jobs, up to the next heading."""
    text = (DOCS / "reference/jobs.md").read_text()
    return re.split(r"^#+ ", text.partition(f"# {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def listed(title: str) -> list[str]:
    """Return the names in the first column of a section's table."""
    rows = [line for line in section(title).splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]


@pytest.mark.parametrize(
    ("title", "model"),
    [("Job", Job), ("JobResult", JobResult), ("Usage", Usage), ("Attempt", Attempt), ("JobError", JobError)],
)
def test_the_reference_has_every_field_and_no_other(title, model):
    """A field that is added, renamed or dropped shows in the reference."""
    assert sorted(listed(title)) == sorted(model.model_fields)


def test_the_reference_has_every_status_and_says_which_are_ends():
    """The table of statuses is that of the code."""
    assert listed("Status") == list(JobStatus)
    ends = {line.split("`")[1] for line in section("Status").splitlines() if line.endswith("| yes |")}
    assert ends == {status for status in JobStatus if status.ended}


def test_the_reference_has_every_error_type():
    """Each type that an error of the package can carry is explained."""

    def types(error: type[AttuneError]) -> Iterator[str]:
        yield error.type
        for child in error.__subclasses__():
            yield from types(child)

    text = section("Error types")
    assert {name for name in types(AttuneError) if f"`{name}`" not in text} == set()


def test_the_reference_has_every_task_type_in_its_tier():
    """The table of task types is that of the code."""
    rows = [line for line in section("Task types").splitlines() if re.match(r"\| (cheap|capable|premium) ", line)]
    tiers = {name: row.split("|")[1].strip() for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[2])}
    assert tiers == {task: get_tier_for_task(task).value for task in TaskType}
