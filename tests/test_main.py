"""The command line: quick help, exit codes, one clear line per error, options that fit the verbs' functions."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import get_type_hints

import pytest
import typer
from typer.testing import CliRunner

import volssl
from volssl.__main__ import VERBS, app, call, main, run_verb, verb_function
from volssl.complaints import is_withheld
from volssl.files import BadInput, Outcome
from volssl.options import share_or_count

HEAVY = ["torch", "numpy", "lightning", "monai", "scipy", "yaml", "SimpleITK", "nibabel", "pydicom", "matplotlib"]


def command(verb: str):
    """The parser of one verb."""
    return typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`volssl` in its own process."""
    return subprocess.run([sys.executable, "-m", "volssl", *arguments], capture_output=True, text=True, check=False)


def test_every_verb_is_a_command_and_the_other_way_round():
    assert list(VERBS) == list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("arguments", [[], *([verb] for verb in VERBS)], ids=lambda arguments: " ".join(arguments) or "volssl")
def test_help_imports_nothing_heavy(arguments):
    snippet = f"""
import json, sys, volssl.__main__ as main
sys.argv = ["volssl", *{arguments!r}, "--help"]
try:
    main.main()
except SystemExit as stop:
    assert not stop.code
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=True)
    text, _, heavy = done.stdout.strip().rpartition("\n")
    assert json.loads(heavy) == []
    assert "Usage: volssl" in text


@pytest.mark.parametrize(("arguments", "limit_s"), [(["--help"], 0.5), (["finetune", "--help"], 1.0)])
def test_help_is_quick(arguments, limit_s):
    def seconds() -> float:
        begun = time.perf_counter()
        run(*arguments)
        return time.perf_counter() - begun

    # The best of five: other tests share the machine.
    assert min(seconds() for _ in range(5)) < limit_s


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_the_arguments_of_the_function(verb):
    function = verb_function(verb)
    hints = get_type_hints(function)
    taken: dict[str, object] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        group = hints[name]
        if dataclasses.is_dataclass(group):
            # The function's own default, which may differ from that of the class: a study's jobs may take a day.
            given = vars(parameter.default) if dataclasses.is_dataclass(parameter.default) else {}
            taken |= {field.name: given.get(field.name, field.default) for field in dataclasses.fields(group)}
        else:
            taken[name] = parameter.default
    offered = inspect.signature(command(verb).callback).parameters
    unknown = set(offered) - set(taken)
    assert not unknown, f"{VERBS[verb]} takes no {unknown}"
    needed = {name for name, default in taken.items() if default in (inspect.Parameter.empty, dataclasses.MISSING)}
    assert needed <= set(offered), f"volssl {verb} cannot give {needed - set(offered)}"
    for name, parameter in offered.items():
        if taken[name] not in (inspect.Parameter.empty, dataclasses.MISSING):
            assert parameter.default == taken[name], f"{verb} --{name}: default differs from {VERBS[verb]}"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["pretrain"], "Missing option '--recipe'"),
        (["prepare", "--out", "x"], "Missing argument 'INDEX'"),
        (["dance"], "No such command 'dance'"),
        (["finetune", "--recipe", "r", "--data", "d", "--out", "o", "--labels", "some"], "must be a share such as 0.1 or a count"),
    ],
)
def test_wrong_usage_exits_2(arguments, part):
    done = run(*arguments)
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_version():
    assert run("--version").stdout == f"volssl {volssl.__version__}\n"


@pytest.fixture
def verb(monkeypatch):
    """Replace what any verb runs."""

    def replace(function):
        monkeypatch.setattr("volssl.__main__.verb_function", lambda _: function)

    return replace


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BadInput("recipe x: must be y"), "volssl report: recipe x: must be y\n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"), "volssl report: a/b: No such file or directory\n"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "volssl report: a/b: Permission denied\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            "volssl report: --out o: No space left on device; make room or choose another, then run it again\n",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_2(verb, capsys, error, line):
    def fail(out):
        raise error

    verb(fail)
    assert run_verb("report", {"out": "o"}) == 2
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error", [ValueError("bug"), OSError(errno.EIO, "Input/output error"), AssertionError()])
def test_a_bug_keeps_its_type_from_python(verb, error):
    def fail():
        raise error

    verb(fail)
    with pytest.raises(type(error)):
        run_verb("report", {})


def test_a_bug_is_told_by_place_and_type_without_its_text(verb, capsys, monkeypatch):
    name = "Quill" + "feather"  # the line of code is shown

    def fail(**options):
        raise ValueError(f"could not convert string to float: {name}")

    verb(fail)
    monkeypatch.setattr("sys.argv", ["volssl", "index", "archive", "--out", "index"])
    monkeypatch.delenv("VOLSSL_WHOLE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit, match="1"):
        main()
    said = capsys.readouterr().err
    assert name not in said
    assert "in fail" in said and "ValueError: its text may quote patients' data" in said
    monkeypatch.setenv("VOLSSL_WHOLE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="Quillfeather"):
        main()


def test_faults_of_verbs_that_read_no_archive_keep_their_text():
    assert is_withheld("index") and not is_withheld("pretrain")


def test_a_file_found_in_an_archive_is_not_named(verb, capsys):
    def fail(archives, out):
        raise PermissionError(errno.EACCES, "Permission denied", "in/Quillfeather/1.dcm")

    verb(fail)
    assert run_verb("report", {"archives": [Path("in")], "out": "o"}) == 2
    assert capsys.readouterr().err == "volssl report: a file in in: Permission denied\n"
    assert run_verb("report", {"archives": [Path("in/Quillfeather/1.dcm")], "out": "o"}) == 2
    assert capsys.readouterr().err == "volssl report: in/Quillfeather/1.dcm: Permission denied\n"


def test_a_traceback_shows_no_local_variables():
    snippet = """
import volssl.__main__ as main
def fail(**options):
    secret = "^".join(["Doe", "Jane"])
    raise RuntimeError("a bug")
main.verb_function = lambda verb: fail
import sys
sys.argv = ["volssl", "demo", "--out", "nowhere"]
main.main()
"""
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RuntimeError: a bug" in done.stderr
    assert "Doe^Jane" not in done.stderr


def test_some_failed_is_exit_3_and_says_where(verb, capsys, tmp_path):
    verb(lambda: Outcome(tmp_path, failed=2, message="7 of 9 done"))
    assert run_verb("prepare", {}) == 3
    said = capsys.readouterr()
    assert said.out == "7 of 9 done\n"
    assert said.err == f"volssl prepare: finished, but 2 failed; {tmp_path / 'failures.csv'} names each with its reason\n"


def test_done_is_exit_0_and_says_where(verb, capsys, tmp_path):
    verb(lambda: Outcome(tmp_path))
    assert run_verb("prepare", {}) == 0
    assert capsys.readouterr() == (f"volssl prepare: done, see {tmp_path}\n", "")


def test_stopped_by_a_signal_is_exit_0_but_not_done(verb, capsys, tmp_path):
    verb(lambda: Outcome(tmp_path, finished=False))
    assert run_verb("finetune", {}) == 0
    assert capsys.readouterr() == (f"volssl finetune: stopped, see {tmp_path}\n", "")


def test_an_interrupt_is_130(verb, capsys):
    def fail():
        raise KeyboardInterrupt

    verb(fail)
    assert run_verb("prepare", {}) == 130
    assert capsys.readouterr().err == "volssl prepare: interrupted\n"


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs /dev/full")
def test_a_full_disk_as_the_system_tells_it(verb, capsys):
    def fail():
        with open("/dev/full", "w") as full:
            full.write("x")

    verb(fail)
    assert run_verb("prepare", {}) == 2
    assert "No space left on device; make room" in capsys.readouterr().err


def test_options_reach_the_function_with_their_types(verb):
    got = {}

    def take(**options):
        got.update(options)
        return Outcome(Path("o"))

    def run_it(recipe, *, data, weights, out, fold, labels, seed, split, resume, overwrite, overrides):
        return take(**locals())

    run_it.__annotations__ = dict.fromkeys(inspect.signature(run_it).parameters, object)
    verb(run_it)
    arguments = ["finetune", "--recipe", "r", "--data", "d", "--out", "o", "--labels", "12", "--fold", "2", "a.b=1", "c=[2, 3]"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert list(got.pop("overrides")) == ["a.b=1", "c=[2, 3]"]
    got.pop("take", None)
    assert got == {
        "recipe": "r", "data": Path("d"), "weights": None, "out": Path("o"), "fold": 2, "labels": 12, "seed": 0, "split": None,
        "resume": False, "overwrite": False,
    }  # fmt: skip


def test_a_share_and_a_count_are_told_apart():
    for text, value in [("0.1", 0.1), ("1.0", 1.0), ("1", 1), ("12", 12)]:
        assert (share_or_count(text), type(share_or_count(text))) == (value, type(value))


def test_grouped_options_are_gathered():
    @dataclasses.dataclass(frozen=True)
    class Split:
        fold: int = 0
        seed: int = 0

    def function(recipe: str, *, split: Split = Split()) -> Outcome:
        return Outcome(Path(recipe), message=f"{split}")

    function.__annotations__ = {"recipe": str, "split": Split, "return": Outcome}
    assert call(function, {"recipe": "r", "fold": 3}).message.endswith("Split(fold=3, seed=0)")


def test_public_names_are_lazy_and_exist():
    snippet = "import sys, volssl; print('torch' in sys.modules, 'yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=True).stdout == "False False\n"
    for name in volssl.__all__:
        assert getattr(volssl, name) is not None
    assert set(volssl.__all__) <= set(dir(volssl))
    with pytest.raises(AttributeError, match="public are: BadInput"):
        volssl.nothing  # noqa: B018
