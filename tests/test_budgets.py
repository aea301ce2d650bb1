"""The budget checker finds each kind of breach, and finds none where none is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "check_budgets.py"

CLEAN = '''"""A module."""


class Tree:
    """A tree."""

    def grow(self, height_m: float, *, by_m: float = 1.0) -> float:
        """The new height."""
        return height_m + by_m
'''


def run(folder: Path) -> tuple[int, str]:
    """Exit code and output of the checker on a folder."""
    done = subprocess.run([sys.executable, TOOL, folder], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def body(lines: int) -> str:
    return "\n".join(["    x = 1"] * lines)


DOC = '"""M."""\n'

SHORT = "".join(f"def _{i}() -> None: ...\n" for i in range(9))

SAMPLES = [
    ("long file", DOC + "x = 1\n" * 350, "a file has at most 350 lines; found 351"),
    ("long function", DOC + SHORT + f'def f() -> None:\n    """D."""\n{body(59)}\n', "f: a function has at most 60 lines; found 61"),
    (
        "many long functions",
        DOC + f'def f() -> None:\n    """D."""\n{body(40)}\n',
        "nine functions in ten have at most 30 lines; found 1 of 1",
    ),
    (
        "eight arguments",
        DOC + "def _f(a: int, *, b: int, c: int, d: int, e: int, g: int, h: int, i: int) -> None: ...\n",
        "at most 7 arguments; found 8",
    ),
    (
        "five in a row",
        DOC + 'def f(a: int, b: int, c: int, d: int, e: int) -> None:\n    """D."""\n',
        "at most 4 arguments may be given by position; found 5",
    ),
    (
        "six in a row",
        DOC + "def _f(a: int, b: int, c: int, d: int, e: int, g: int) -> None: ...\n",
        "at most 5 arguments may be given by position; found 6",
    ),
    ("bare argument", DOC + "def _f(a, *, b: int, **rest) -> None: ...\n", "every argument is annotated; not so: a, rest"),
    ("deep classes", DOC + "class _A: ...\n\n\nclass _B(_A): ...\n\n\nclass _C(_B): ...\n", "_C: own classes go 2 deep; found 3"),
    ("silent module", "x = 1\n", "the module is public and has a docstring; found none"),
    ("silent function", DOC + "def f() -> None: ...\n", "f is public and has a docstring; found none"),
    ("silent class", DOC + "class A:\n    x = 1\n", "A is public and has a docstring; found none"),
    ("silent method", DOC + 'class A:\n    """D."""\n\n    def f(self) -> None: ...\n', "f is public and has a docstring; found none"),
]


@pytest.mark.parametrize(("text", "complaint"), [sample[1:] for sample in SAMPLES], ids=[sample[0] for sample in SAMPLES])
def test_each_breach_is_found_and_is_the_only_one(tmp_path, text, complaint):
    (tmp_path / "sample.py").write_text(text)
    code, output = run(tmp_path)
    assert code == 1
    assert complaint in output
    assert len(output.splitlines()) == 1, output


def test_a_clean_file_passes(tmp_path):
    (tmp_path / "sample.py").write_text(CLEAN)
    assert run(tmp_path) == (0, "budgets hold\n")


def test_depth_is_counted_across_files_and_outside_classes_count_nothing(tmp_path):
    (tmp_path / "first.py").write_text(DOC + "class _A(Module): ...\n")
    (tmp_path / "second.py").write_text(DOC + "class _B(first._A): ...\n")
    assert run(tmp_path)[0] == 0
    (tmp_path / "third.py").write_text(DOC + "class _C(second._B[int]): ...\n")
    assert "_C: own classes go 2 deep; found 3" in run(tmp_path)[1]


def test_the_project_keeps_its_budgets():
    root = TOOL.parents[1]
    done = subprocess.run([sys.executable, TOOL, root / "volssl", root / "tools"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
