import os

import pytest

from attune_worker import SourceFileError, count_lines_of_code
from attune_worker.models.source_lines import MAX_SOURCE_BYTES

COUNTED = [
    ("a.py", "# comment\n\nx = 1  # and code\n   \n  # more\ndef f():\n    return x\n", 3),
    ("a.py", '"""Docstring\n\nof two lines."""\ns = """\n# not a comment\n"""\n', 5),
    ("a.py", "x = 1", 1),
    ("a.py", "", 0),
    ("a.py", "\n\n# only\n", 0),
    ("a.py", "x = 1\r\n\r\n# c\r\ny = 2\r\n", 2),
    ("a.py", "def f(:\n  ???\n", 2),
    ("a.js", "// c\nlet a = '// no';\n/* b\n c */ let d;\n", 2),
    ("a.ts", "/** doc */\nexport const a: number = 1;\n", 1),
    ("a.go", "package a\n// c\n\nvar x = `\n// text\n`\n", 4),
    ("a.c", "#include <stdio.h>\n#define A 1\n/* c\n */\nint x;\n", 3),
    ("a.rs", "/// doc\n//! doc\n// c\nfn a() {}\n", 1),
    ("a.java", "/**\n * Doc.\n */\nclass A {}\n", 1),
    ("a.sql", "-- c\nselect 1;\n/* x\n*/\n", 1),
    ("a.lua", "-- c\nlocal x = 1\n--[[ long\n]]\n", 1),
    ("a.lisp", "; c\n(a)\n#| b\n|#\n", 1),
    ("a.tex", "% c\n\\a\n", 1),
    ("a.html", "<!-- a\n\nb -->\n<p>x</p>\n<script>\n// c\nvar x;\n</script>\n", 4),
    ("a.php", "<?php\n// c\n$a = 1;\n", 2),
    ("a.sh", "#!/bin/sh\n# c\necho hi # t\n", 1),
    ("a.pl", "#!/usr/bin/perl\n# c\nmy $x = 1;\n", 1),
    ("script", "#!/usr/bin/env python3\n# c\nx = 1\n", 1),
    ("a.unheard-of", "# who knows\n\ntext\n", 2),
]


@pytest.mark.parametrize(("name", "text", "lines"), COUNTED, ids=[f"{n}-{one[0]}" for n, one in enumerate(COUNTED)])
def test_lines_with_code_are_counted(tmp_path, name, text, lines):
    """Neither blank ones nor those with nothing but a comment, in each language's own way."""
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert count_lines_of_code(path) == lines
    assert count_lines_of_code(str(path)) == lines


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
def test_text_in_other_encodings_is_text(tmp_path, encoding):
    """With a mark at its beginning or without."""
    path = tmp_path / "a.py"
    path.write_bytes("# é\nx = 'é'\n\ny = 1\n".encode(encoding))
    assert count_lines_of_code(path) == 2


@pytest.mark.parametrize(
    "raw",
    [b"\x7fELF\x02\x01\x01\x00", b"\x89PNG\r\n\x1a\n\x00", b"\x1f\x8b\x08\x01\x02", b"x = 1\n\x00", b"\xff\xfe\x00"],
)
def test_binary_files_are_an_error(tmp_path, raw):
    """They have no lines, which is not the same as 0 lines."""
    path = tmp_path / "a.py"
    path.write_bytes(raw)
    with pytest.raises(SourceFileError, match="it is a binary file"):
        count_lines_of_code(path)


def test_what_is_no_source_file_is_an_error(tmp_path):
    """Missing, a folder, a pipe that would never end, a dump of data: the path and the reason."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.sql").write_bytes(b"-- dump\n" * (MAX_SOURCE_BYTES // 8 + 1))
    (tmp_path / "circle.py").symlink_to("circle.py")
    for name, reason in (
        ("gone.py", "there is no such file"),
        (".", "it is a folder"),
        ("pipe", "not a regular file"),
        ("a.sql", "too many for a source file"),
        ("circle.py", "cannot be read"),
        ("gone\0.py", "cannot be read"),
    ):
        with pytest.raises(SourceFileError, match=reason) as refused:
            count_lines_of_code(tmp_path / name)
        assert refused.value.path == str(tmp_path / name)
        assert refused.value.exit_code == 2
