"""Checks an installed volssl from outside its checkout: the command answers, recipes and page templates came along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Run the checks in this interpreter's environment; a failed one raises."""
    import volssl
    from volssl.recipe import load, shelf_of_recipes

    package = Path(volssl.__file__).parent
    assert package.is_relative_to(sys.prefix), f"found {package}, which is not the installed wheel under {sys.prefix}"
    command = Path(sys.executable).with_name("volssl")
    verbs = _verbs()
    for arguments in ([], *([verb] for verb in verbs)):
        subprocess.run([command, *arguments, "--help"], check=True, stdout=subprocess.DEVNULL)
    recipes = sorted(shelf_of_recipes().glob("*.yaml"))
    assert recipes, "the wheel holds no recipes"
    assert shelf_of_recipes().is_relative_to(package), f"the recipes lie outside the wheel: {shelf_of_recipes()}"
    for recipe in recipes:
        load(recipe.stem, verb=_verb_of(recipe))
    print(f"volssl {volssl.__version__}: {len(verbs)} verbs answer, {len(recipes)} recipes load")


def _verbs() -> list[str]:
    from volssl.__main__ import VERBS

    return list(VERBS)


def _verb_of(recipe: Path) -> str:
    import yaml

    return yaml.safe_load(recipe.read_text(encoding="utf-8"))["verb"]


if __name__ == "__main__":
    main()
