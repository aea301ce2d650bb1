"""Recipes: a YAML file whose keys are the arguments of the classes and functions it names, checked before anything runs.

All complaints of a recipe come at once; an unknown key is answered with the list of the known ones.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError, create_model

import volssl
from volssl.files import BadInput, write_text


@dataclass(frozen=True)
class Part:
    """One named piece of a recipe: a class from a shelf with its checked arguments."""

    name: str
    target: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self, *positional: Any, **extra: Any) -> Any:
        """Make the object; `extra` are the arguments that only the code knows."""
        return self.target(*positional, **self.arguments, **extra)


def shelf_of_recipes() -> Path:
    """Folder of the shipped recipes: inside an installed package, or beside it in a checkout."""
    package = Path(volssl.__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def load(name_or_path: str | Path, overrides: Sequence[str] = (), *, verb: str) -> dict[str, Any]:
    """Read a recipe for `verb`, lay the preset it names over it, and over both the `key=value` overrides (dotted keys, YAML values).

    A recipe may hold `presets`, name -> some of its keys with other values; `preset`, in it or as an override, chooses one.
    Raises: BadInput: recipe not found, not YAML, written for another verb, an unknown preset, or an override that is not `key=value`.
    """
    path = _locate(name_or_path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"recipe {name_or_path}: must be YAML; {error}") from None
    if not isinstance(values, dict):
        raise BadInput(f"recipe {name_or_path}: must be a mapping of keys to values; found {type(values).__name__}")
    written_for = values.pop("verb", None)
    if written_for != verb:
        raise BadInput(f"recipe {name_or_path}: must say `verb: {verb}` to be run by it; found {written_for!r}; choose a recipe for {verb}")
    values = _with_named_preset(values, [override for override in overrides if override.startswith("preset=")], name_or_path)
    for override in overrides:
        if not override.startswith("preset="):
            _lay_over(values, override)
    return values


def _with_named_preset(values: dict[str, Any], asked: Sequence[str], where: str | Path) -> dict[str, Any]:
    presets, name = values.pop("presets", None) or {}, values.pop("preset", None)
    name = asked[-1].partition("=")[2] if asked else name
    if name is None:
        return values
    if name not in presets:
        raise BadInput(f"recipe {where}: preset must be one of {', '.join(presets) or 'none'}; found {name!r}")
    return laid_over(values, presets[name])


def _locate(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.is_file():
        return path
    shelf = shelf_of_recipes()
    shipped = shelf / (path.name if path.suffix == ".yaml" else f"{path.name}.yaml")
    if len(path.parts) == 1 and shipped.is_file():
        return shipped
    known = ", ".join(sorted(entry.stem for entry in shelf.glob("*.yaml"))) or "none"
    raise BadInput(f"recipe {name_or_path}: must be a file or a shipped recipe; found neither; shipped are: {known}")


def _lay_over(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise BadInput(f"override {override!r}: must be key=value (a dotted key reaches inside: training.steps=200)")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"override {override!r}: the value must be YAML; {error}") from None
    *path, last = dotted.split(".")
    place = values
    for key in path:
        if not isinstance(place.setdefault(key, {}), dict):
            raise BadInput(f"override {override!r}: {key!r} holds a plain value, so nothing lies inside it")
        place = place[key]
    place[last] = value


def save(values: Mapping[str, Any], path: Path, *, verb: str, remark: str = "") -> None:
    """Write a resolved recipe that `load` reads again. remark: a comment on top of it."""
    write_text(path, (f"# {remark}\n" if remark else "") + yaml.safe_dump({"verb": verb, **values}, sort_keys=False, allow_unicode=True))


def parse(values: Mapping[str, Any], parts: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check every key of a recipe and build what it names.

    Args:
        values: the recipe. parts: key -> what it holds: the name of a shelf (the value is a mapping with `name:`; gives a `Part`),
            a dataclass (gives an instance) or any other type annotation (gives the checked value; plain types have no default
            and may be left out only if they admit None).
        where: the recipe's name, for errors.
    Raises: BadInput: with all complaints at once.
    """
    complaints = [f"unknown key {key!r}; known are: {', '.join(parts)}" for key in values if key not in parts]
    made: dict[str, Any] = {}
    for key, part in parts.items():
        try:
            made[key] = _parse_one(values.get(key), part, key)
        except BadInput as error:
            complaints.append(str(error))
    if complaints:
        raise BadInput(f"recipe {where} has {len(complaints)} fault(s); mend them:\n  " + "\n  ".join("\n".join(complaints).splitlines()))
    return made


def _parse_one(value: Any, part: Any, key: str) -> Any:
    if isinstance(part, str):
        if not isinstance(value, Mapping) or "name" not in value:
            raise BadInput(f"{key}: must be a mapping with `name:`, one of {', '.join(on_shelf(part))}; found {value!r}")
        target = find(part, str(value["name"]))
        return Part(str(value["name"]), target, arguments(target, _with_preset(target, value, key), key))
    if dataclasses.is_dataclass(part) and isinstance(part, type):
        if value is not None and not isinstance(value, Mapping):
            raise BadInput(f"{key}: must be a mapping; found {value!r}")
        made = arguments(part, value or {}, key)
        try:
            return part(**made)
        except BadInput as error:
            raise BadInput(f"{key}: {error}") from None
    annotation: Any = part
    try:
        return TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        raise BadInput(_plain(error, key, ())) from None


def _with_preset(target: Callable[..., Any], value: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The arguments, laid over those of the preset that `preset:` names among the target's PRESETS."""
    given = {k: v for k, v in value.items() if k != "name"}
    presets = getattr(target, "PRESETS", {})
    if not presets or "preset" not in given:
        return given
    name = given.pop("preset")
    if name not in presets:
        raise BadInput(f"{key}.preset: must be one of {', '.join(presets)}; found {name!r}")
    return laid_over(presets[name], given)


def laid_over(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `under` with those of `over` in their place, key by key; mappings are laid over each other in turn."""
    both = {k: laid_over(under[k], v) if isinstance(v, Mapping) and isinstance(under.get(k), Mapping) else v for k, v in over.items()}
    return {**under, **both}


def on_shelf(shelf: str) -> list[str]:
    """Names of the files on a shelf that hold something a recipe can name."""
    package = importlib.import_module(f"volssl.{shelf}")
    return sorted(info.name for info in pkgutil.iter_modules(package.__path__) if _offers(shelf, info.name))


def _offers(shelf: str, name: str) -> bool:
    return hasattr(importlib.import_module(f"volssl.{shelf}.{name}"), "RECIPE_NAME")


def find(shelf: str, name: str) -> Callable[..., Any]:
    """The class that `volssl/<shelf>/<name>.py` offers to recipes: the one its RECIPE_NAME names."""
    names = on_shelf(shelf)
    if name not in names:
        raise BadInput(f"{shelf}: name must be one of {', '.join(names)}; found {name!r}")
    module = importlib.import_module(f"volssl.{shelf}.{name}")
    return getattr(module, module.RECIPE_NAME)


def arguments(target: Callable[..., Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check `values` against the signature of `target` and return them with their declared types.

    A parameter that a recipe cannot hold (a module, a tensor) is left for the code to give.
    """
    hints = get_type_hints(target if not inspect.isclass(target) or dataclasses.is_dataclass(target) else target.__init__)
    known: dict[str, Any] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        try:
            TypeAdapter(hints[name])
        except PydanticUserError:
            continue
        # A class may get its required arguments from the code; a dataclass is made from the recipe alone.
        required = ... if dataclasses.is_dataclass(target) else None
        known[name] = (hints[name], required if parameter.default is parameter.empty else parameter.default)
    model = create_model("Arguments", __config__=ConfigDict(extra="forbid", protected_namespaces=()), **known)
    try:
        checked = model(**values)
    except ValidationError as error:
        raise BadInput(_plain(error, where, tuple(known))) from None
    return {name: getattr(checked, name) for name in values}


def _plain(error: ValidationError, where: str, known: tuple[str, ...]) -> str:
    lines = []
    for fault in error.errors(include_url=False):
        place = ".".join([where, *(str(part) for part in fault["loc"])])
        if fault["type"] == "extra_forbidden":
            lines.append(f"{place}: unknown key; known are: {', '.join(known)}")
        else:
            lines.append(f"{place}: {fault['msg']}; found {fault['input']!r}")
    return "\n".join(lines)
