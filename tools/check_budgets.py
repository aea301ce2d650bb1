"""Holds the size budgets of docs/architecture.md: `python tools/check_budgets.py volssl tools` lists what breaks one, and exits 1."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FILE_LINES = 350
FUNCTION_LINES = 60
SHORT_LINES = 30  # one function in ten may be longer
ARGUMENTS = 7
# Keyword-only after the first is the aim. Mathematics reads better with its tensors in a row (two pairs of them, say), so the rule bites
# at the fifth; a private function is called from its own file alone, where one more can still be followed.
POSITIONAL = 4
POSITIONAL_PRIVATE = 5
CLASS_DEPTH = 2

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One parsed file."""

    path: Path
    text: str
    tree: ast.Module


def check(folders: Sequence[Path]) -> list[str]:
    """Every breach in the Python files under `folders`, as `path:line: what must hold; found ...`."""
    sources = [_read(path) for folder in folders for path in sorted(folder.rglob("*.py"))]
    breaches = [breach for source in sources for breach in _check_file(source)]
    return breaches + _check_shares(sources) + _check_depth(sources)


def _read(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    return Source(path, text, ast.parse(text))


def _check_file(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    if lines > FILE_LINES:
        yield f"{source.path}:1: a file has at most {FILE_LINES} lines; found {lines}"
    yield from (f"{source.path}:{breach}" for breach in _check_docs(source.tree, "the module"))
    for function in _functions(source.tree):
        yield from (f"{source.path}:{function.lineno}: {function.name}: {breach}" for breach in _check_function(function))


def _check_function(function: Function) -> Iterator[str]:
    if (lines := _lines(function)) > FUNCTION_LINES:
        yield f"a function has at most {FUNCTION_LINES} lines; found {lines}"
    given = function.args
    positional = [argument for argument in given.posonlyargs + given.args if argument.arg not in ("self", "cls")]
    named = positional + given.kwonlyargs
    if len(named) > ARGUMENTS:
        yield f"at most {ARGUMENTS} arguments; found {len(named)}"
    most = POSITIONAL_PRIVATE if function.name.startswith("_") and not function.name.startswith("__") else POSITIONAL
    if len(positional) > most:
        yield f"at most {most} arguments may be given by position; found {len(positional)}"
    starred = [argument for argument in (given.vararg, given.kwarg) if argument]
    if bare := [argument.arg for argument in named + starred if argument.annotation is None]:
        yield f"every argument is annotated; not so: {', '.join(bare)}"


def _check_docs(node: ast.Module | ast.ClassDef | Function, what: str) -> Iterator[str]:
    """Public modules, classes, functions and methods have a docstring; what is nested in a function is nobody's to call."""
    if not ast.get_docstring(node) and not (isinstance(node, Function) and _explains_itself(node)):
        yield f"{getattr(node, 'lineno', 1)}: {what} is public and has a docstring; found none"
    if isinstance(node, Function):
        return
    for child in node.body:
        if isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_"):
            yield from _check_docs(child, child.name)


def _explains_itself(function: Function) -> bool:
    # `forward` is documented by its class, as torch has it; an override by what it overrides.
    decorators = {ast.unparse(decorator).split(".")[-1] for decorator in function.decorator_list}
    return function.name == "forward" or "override" in decorators or any(name == "setter" for name in decorators)


def _check_shares(sources: Sequence[Source]) -> list[str]:
    functions = [(source, function) for source in sources for function in _functions(source.tree)]
    long = [(source, function) for source, function in functions if _lines(function) > SHORT_LINES]
    if 10 * len(long) <= len(functions):
        return []
    names = ", ".join(f"{source.path}:{function.name} ({_lines(function)})" for source, function in long)
    return [f"nine functions in ten have at most {SHORT_LINES} lines; found {len(long)} of {len(functions)} longer: {names}"]


def _check_depth(sources: Sequence[Source]) -> list[str]:
    classes = {node.name: (source, node) for source in sources for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)}
    parents = {name: [ast.unparse(parent).split("[")[0].split(".")[-1] for parent in node.bases] for name, (_, node) in classes.items()}

    def depth(name: str) -> int:
        # Classes from outside count nothing: nn.Module -> UNet is one of ours.
        return 1 + max((depth(parent) for parent in parents[name] if parent in classes and parent != name), default=0)

    deep = [(name, found) for name in classes if (found := depth(name)) > CLASS_DEPTH]
    return [
        f"{classes[name][0].path}:{classes[name][1].lineno}: {name}: own classes go {CLASS_DEPTH} deep; found {found}"
        for name, found in deep
    ]


def _functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def _lines(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


if __name__ == "__main__":
    found = check([Path(argument) for argument in sys.argv[1:]])
    print("\n".join(found) if found else "budgets hold")
    sys.exit(1 if found else 0)
