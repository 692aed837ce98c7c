"""Is what is installed here what attune-worker was made for?"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement

from attune_worker.doctor.finding import Finding, Level

PACKAGE = "attune-worker"
SHOWN = (PACKAGE, "celery", "kombu", "redis", "httpx", "pydantic", "genai-prices", "flower")

_TESTED = re.compile(r"Programming Language :: Python :: (3\.\d+)")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    return {"python": platform.python_version(), **{name: version(name) for name in SHOWN}}


def look() -> Iterator[Finding]:
    """Look at Python, and at the packages that attune-worker needs."""
    classifiers = metadata(PACKAGE).get_all("Classifier") or []
    yield python(platform.python_version(), _TESTED.findall("\n".join(classifiers)))
    yield packages(requires(PACKAGE) or [], version)


def python(running: str, tested: Sequence[str]) -> Finding:
    """Judge the version of Python that is ``running``, when these are ``tested``."""
    text = f"{running}; tested with {', '.join(tested)}"
    if running.rpartition(".")[0] in tested:
        return Finding("python", Level.OK, text)
    return Finding("python", Level.WARNING, text, f"Run it with Python {tested[-1]}.")


def packages(required: Sequence[str], installed: Callable[[str], str]) -> Finding:
    """Judge the packages that are there; ``installed`` returns a version, or raises ``PackageNotFoundError``."""
    wrong = []
    for needed in map(Requirement, required):
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = installed(needed.name)
        except PackageNotFoundError:
            wrong.append(f"{needed.name} is missing")
            continue
        if not needed.specifier.contains(found, prereleases=True):
            wrong.append(f"{needed.name} is {found} and should be {needed.specifier}")
    if wrong:
        return Finding("packages", Level.WARNING, "; ".join(wrong), f"pip install --upgrade {PACKAGE}")
    return Finding("packages", Level.OK, "all that are needed are there, in versions that fit")
