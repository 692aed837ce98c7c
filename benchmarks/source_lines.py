"""How many bytes has a line of code? The top modules of Python's own standard library, as an example of source files.

    python benchmarks/source_lines.py

Auth strategies and estimates go by it until a fleet has learned better: a token is about four bytes.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from attune_worker.models.auth import DEFAULT_TOKENS_PER_LINE
from attune_worker.models.routing import BYTES_PER_TOKEN
from attune_worker.models.source_lines import count_lines_of_code


def main() -> int:
    """Run the command."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    lines = sum(count_lines_of_code(file) for file in files)
    size = sum(file.stat().st_size for file in files)
    print(f"Python {sys.version.split()[0]}: {len(files)} modules, {lines:,} lines of code, {size:,} bytes")
    each = size / lines
    print(f"{each:.1f} bytes a line, {each / BYTES_PER_TOKEN:.1f} tokens (default: {DEFAULT_TOKENS_PER_LINE:g})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
