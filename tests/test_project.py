"""The project files hold together: one set of pinned versions, no torchvision, nothing undeclared, the order of the architecture page."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# What pip and a virtual environment bring themselves; setuptools is pinned, since torch needs it at run time.
TOOLS = {"pip", "volssl"}


def pins() -> dict[str, Version]:
    """constraints.txt: name -> version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for requirement in found:
        assert re.fullmatch(r"==[^,+*]+", str(requirement.specifier)), f"{requirement}: must be one exact public version"
    assert len({canonicalize_name(requirement.name) for requirement in found}) == len(found), "constraints.txt names a package twice"
    return {canonicalize_name(requirement.name): Version(str(requirement.specifier)[2:]) for requirement in found}


def direct() -> list[Requirement]:
    """Every requirement that pyproject.toml states, extras included."""
    project = PROJECT["project"]
    extras = [text for group in project["optional-dependencies"].values() for text in group]
    return [Requirement(text) for text in project["dependencies"] + extras]


def closure(names: set[str]) -> set[str]:
    """Everything that an install of `names` brings on this machine, by the metadata of what is installed."""
    seen: set[str] = set()
    waiting = {canonicalize_name(name) for name in names}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting |= {canonicalize_name(requirement.name)} - seen
    return seen


def test_every_pin_satisfies_the_range_it_serves():
    pinned = pins()
    for requirement in direct():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} does not admit the pin {pinned[name]}"


def test_the_installed_versions_are_the_pinned_ones():
    pinned = pins()
    project = PROJECT["project"]
    groups = [project["dependencies"], project["optional-dependencies"]["test"]]
    brought = closure({Requirement(text).name for group in groups for text in group}) - TOOLS
    assert not brought - set(pinned), "these are installed without a pin"
    # A local tag (+cpu) is the same release built for other hardware.
    installed = {name: Version(importlib.metadata.version(name)).public for name in brought}
    assert installed == {name: pinned[name].public for name in brought}


def test_conda_installs_the_same_set():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, last = environment["dependencies"]
    assert last == {"pip": ["-c constraints.txt", "-e .[test]"]}
    python = next(entry for entry in conda if entry.startswith("python="))
    assert python.removeprefix("python=") in PROJECT["project"]["requires-python"]
    assert set(conda) == {python, "pip", "make"}, "everything else comes from constraints.txt"


def test_make_installs_the_same_set():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert '-m pip install -q -c constraints.txt -e ".[test]"' in makefile
    assert "$(STAMP): pyproject.toml constraints.txt\n" in makefile
    for install in re.findall(r"pip install.*", makefile):
        # nnU-Net's own environment has another version of a package; each line there is pinned.
        assert "-c constraints.txt" in install or install.endswith("--no-deps -r tools/nnunet_packages.txt")
    own = [line for line in (ROOT / "tools" / "nnunet_packages.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert own and all("==" in line for line in own)


def test_nothing_brings_torchvision():
    core = {Requirement(text).name for text in PROJECT["project"]["dependencies"]}
    extras = {requirement.name for requirement in direct()}
    brought = closure({name for name in core | extras if _is_installed(name)})
    assert {"torch", "monai", "lightning"} <= brought
    assert not {"torchvision", "torchaudio"} & brought
    assert not {"torchvision", "torchaudio"} & set(pins())


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_what_is_imported_is_declared():
    by_module = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["project"]["dependencies"]}
    extras = {canonicalize_name(requirement.name) for requirement in direct()}
    used: set[str] = set()
    for path in sorted((ROOT / "volssl").rglob("*.py")):
        for module in imported(path) - set(sys.stdlib_module_names) - {"volssl"}:
            assert module not in ("torchvision", "torchaudio"), path
            homes = {canonicalize_name(name) for name in by_module.get(module, [module])}
            used |= homes
            assert homes & extras, f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml does not declare"
    assert declared - used == {"tensorboard"}, "declared, but imported nowhere (TensorBoard is imported by way of torch)"


def test_names_that_say_nothing_are_not_used():
    vague = {"utils", "common", "misc", "helpers", "base", "core", "manager"}
    found = [path for folder in ("volssl", "tools", "tests") for path in (ROOT / folder).rglob("*") if path.stem in vague]
    assert not found


def test_every_source_file_is_tested():
    """A source file has its own test file, shelves mirrored as folders; or a neighbour's test imports it by name."""
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path.name != "test_project.py"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in tests)
    contracts = {"augment/transform.py", "methods/method.py"}  # tested through every class that fulfils them
    missing = []
    for path in sorted((ROOT / "volssl").rglob("*.py")):
        inside = path.relative_to(ROOT / "volssl")
        twin = ROOT / "tests" / inside.parent / f"test_{inside.stem.strip('_')}.py"
        module = ".".join(["volssl", *inside.with_suffix("").parts])
        package, _, name = module.rpartition(".")
        imports = rf"(from {re.escape(module)} import|import {re.escape(module)}\b|from {re.escape(package)} import [^\n]*\b{name}\b)"
        if inside.name != "__init__.py" and str(inside) not in contracts and not twin.exists() and not re.search(imports, text):
            missing.append(str(inside))
    assert not missing


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "CHANGELOG.md", "docs/architecture.md", "environment.yml", ".ci/run"])
def test_the_house_is_furnished(name):
    assert (ROOT / name).stat().st_size > 0


def test_the_licence_is_the_whole_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"


def test_the_architecture_page_lists_every_file():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^  (\w+)(?:\.py|/)", page, flags=re.MULTILINE))
    present = {path.stem for path in (ROOT / "volssl").glob("*.py")} | {
        path.parent.name for path in (ROOT / "volssl").glob("*/__init__.py")
    }
    assert listed == present - {"__init__"}


def test_the_layers_are_those_of_the_architecture_page():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    flow = re.search(r"`(files < [^`]*)`", page)
    assert flow, "docs/architecture.md must tell the order as `files < recipe < ...`"
    order = [name.strip() for name in flow.group(1).replace("\n", " ").split("<")]
    contract = next(entry for entry in PROJECT["tool"]["importlinter"]["contracts"] if entry["type"] == "layers")
    assert [layer.strip() for layer in reversed(contract["layers"])] == order


def test_test_files_have_names_of_their_own():
    # pytest imports them by their bare names: of two alike in different folders it would refuse one.
    names = [path.name for path in Path("tests").rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}
