"""Recipes: overrides, all complaints at once, unknown keys with the known ones."""

from dataclasses import dataclass, field

import pytest

from volssl import recipe
from volssl.files import BadInput


@dataclass(frozen=True)
class Inner:
    width: int = 3


@dataclass(frozen=True)
class Settings:
    steps: int
    lr: float = 1e-3
    sizes: tuple[tuple[int, int, int], ...] = ((1, 2, 3),)
    inner: Inner = field(default_factory=Inner)


def written(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_load_lays_overrides_over_the_file(tmp_path):
    path = written(tmp_path, "verb: pretrain\nsettings: {steps: 5}\n")
    values = recipe.load(path, ["settings.lr=0.5", "settings.inner.width=9", "settings.sizes=[[4, 5, 6]]"], verb="pretrain")
    made = recipe.parse(values, {"settings": Settings}, "mine")["settings"]
    assert made == Settings(steps=5, lr=0.5, sizes=((4, 5, 6),), inner=Inner(9))
    recipe.save(values, tmp_path / "again.yaml", verb="pretrain")
    assert recipe.load(tmp_path / "again.yaml", verb="pretrain") == values


def test_all_complaints_come_at_once_and_name_the_known_keys():
    values = {"settings": {"stepz": 1, "lr": "fast", "inner": {"widht": 1}}, "extra": 1, "net": {"name": "nonet"}}
    with pytest.raises(BadInput) as caught:
        recipe.parse(values, {"settings": Settings, "net": "nets"}, "mine")
    told = str(caught.value)
    for part in (
        "'extra'; known are: settings, net",
        "settings.lr",
        "settings.stepz: unknown key",
        "settings.steps",
        "widht",
        "one of",
        "unet",
    ):
        assert part in told, part


def test_shelf_parts_are_checked_and_built():
    part = recipe.parse({"net": {"name": "unet", "width": 4, "depth": 3}}, {"net": "nets"}, "mine")["net"]
    assert part.build(skips=True).encoder.channels == (8, 16, 32)
    with pytest.raises(BadInput, match="unknown key; known are: in_channels, width, depth, norm, skips"):
        recipe.parse({"net": {"name": "unet", "breadth": 4}}, {"net": "nets"}, "mine")


@pytest.mark.parametrize(
    ("text", "told"),
    [("verb: index\n", "verb: pretrain"), ("[1]", "must be a mapping"), ("a: [", "must be YAML")],
)
def test_a_file_that_is_no_recipe_for_the_verb(tmp_path, text, told):
    with pytest.raises(BadInput, match=told):
        recipe.load(written(tmp_path, text), verb="pretrain")


def test_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(BadInput, match=r"shipped are: .*prepare_ct"):
        recipe.load("no_such_recipe", verb="pretrain")


@pytest.mark.parametrize("override", ["steps", "=3", "settings.steps.deep=1"])
def test_override_must_be_key_value(tmp_path, override):
    with pytest.raises(BadInput, match="override"):
        recipe.load(written(tmp_path, "verb: pretrain\nsettings: {steps: 5}\n"), [override], verb="pretrain")


def test_every_shipped_recipe_names_a_verb():
    import yaml

    for path in recipe.shelf_of_recipes().glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["verb"], path.name
