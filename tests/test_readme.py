"""The README keeps its word: every command in it parses, every file, recipe, verb and target it names exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from volssl.__main__ import VERBS, app
from volssl.recipe import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FIRST_SCREEN = "\n".join(README.splitlines()[:25])


def commands(text: str) -> list[list[str]]:
    """Words of every shell command in the code blocks of a page; comments and `\\` at line ends understood."""
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.split(r"&&|;", line.split("#")[0])]
    return [words for part in parts if (words := shlex.split(part.removeprefix("$ ")))]


SHOWN = [(page.name, words) for page in PAGES for words in commands(page.read_text(encoding="utf-8"))]
VOLSSL = [(page, words) for page, words in SHOWN if words[0] == "volssl"]


@pytest.mark.parametrize(("page", "words"), VOLSSL, ids=[f"{page}: {' '.join(words)}" for page, words in VOLSSL])
def test_every_command_parses(page, words):
    group = typer.main.get_command(app)
    if words[1:] in (["--help"], ["--version"]):
        return
    verb, *arguments = words[1:]
    assert verb in VERBS, f"{page}: volssl {verb} is not a verb"
    parser = group.commands[verb]  # type: ignore[attr-defined]
    if any(word.startswith("[") or word.endswith("...") for word in arguments):  # a synopsis: its options must exist
        known = {name for parameter in parser.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert set(re.findall(r"--[\w-]+", " ".join(arguments))) <= known
        return
    if arguments == ["--help"]:
        return
    options = parser.make_context(verb, arguments).params
    if verb == "evaluate" and str(options["recipe"]).isupper():  # a run's folder, which may stand for its recipe
        return
    if options.get("recipe") and not Path(options["recipe"]).is_absolute():
        load(options["recipe"], options.get("overrides") or (), verb=verb if verb != "evaluate" else "finetune")


@pytest.mark.parametrize("verb", [verb for verb in VERBS if (ROOT / "docs" / f"{verb}.md").exists()])
def test_a_verbs_page_shows_its_call(verb):
    assert any(words[:2] == ["volssl", verb] for words in commands((ROOT / "docs" / f"{verb}.md").read_text(encoding="utf-8")))


def test_the_quick_start_is_there():
    verbs = [words[1] for page, words in VOLSSL if page == "README.md"]
    assert verbs[:3] == ["index", "prepare", "pretrain"]
    assert {"finetune", "report"} <= set(verbs)


@pytest.mark.parametrize("words", [words for _, words in SHOWN if words[0] == "make"], ids=" ".join)
def test_every_make_target_exists(words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in words[1:]:
        if "=" not in target:
            assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), target


def test_the_first_screen_tells_how_to_begin():
    assert "make demo" in FIRST_SCREEN
    assert "make test" in FIRST_SCREEN
    assert 'pip install -c constraints.txt -e ".[test]"' in FIRST_SCREEN
    assert "conda env create -f environment.yml" in FIRST_SCREEN


def test_ci_runs_the_readme_s_test_command():
    assert re.search(r"\bmake test\b", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_verb_is_in_the_table():
    rows = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
    assert rows == list(VERBS)


def test_the_python_example_names_what_exists():
    import volssl

    for names in re.findall(r"^from volssl import (.+)$", README, flags=re.MULTILINE):
        for name in names.split(","):
            assert hasattr(volssl, name.strip())
