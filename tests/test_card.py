"""The card: read whole or refused with all that is wrong; prepare follows it; the hub reads the model card."""

import json

import pytest
import yaml

from volssl import preparation_of, prepare
from volssl.card import LARGEST_CARD, as_card_says, model_card, read_card
from volssl.files import BadInput
from volssl.recipe import load, save
from volssl.segment import Preparation

CT = {"modality": "CT", "clip": [-500, 600], "window": [-150, 250], "percentiles": None, "normalisation": "zscore"}
MR = {"modality": "MR", "clip": [0, 2000], "window": [0, 1000], "percentiles": [1.0, 99.0], "normalisation": "none"}


def written(folder, **changes):
    facts = {
        "schema": 1,
        "architecture": {"name": "unet", "arguments": {}},
        "in_channels": 1,
        "spacing_mm": [1.5, 1.5, 3.0],
        "orientation": "RAS",
        "intensity": CT,
        "method": "pcrlv2",
        "recipe": {},
        "steps": 7,
        "data": {"train_scans": 3, "train_patients": 2},
        "sha256": "0" * 64,
        "volssl_version": "0",
        "citations": ["A, B: C"],
        "licence": "as the data",
    }
    folder.mkdir(exist_ok=True)
    (folder / "card.json").write_text(json.dumps(facts | changes))
    return folder


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"schema": 2}, "update volssl"),
        ({"schema": "1"}, "integer `schema`"),
        ({"citations": "A"}, "`citations` must be of type list; found 'A'"),
        ({"sha256": None, "in_channels": True}, "`sha256` must be of type str.*`in_channels` must be of type int"),
        ({"spacing_mm": [1, 1]}, "`spacing_mm` must be three numbers above 0"),
        ({"spacing_mm": [1, 1, 0]}, "`spacing_mm`"),
        ({"architecture": "unet"}, "`architecture`"),
        ({"intensity": {"modality": "CT"}}, "`intensity`"),
    ],
)
def test_a_card_that_is_none_is_refused(tmp_path, changes, told):
    with pytest.raises(BadInput, match=told):
        read_card(written(tmp_path / "bundle", **changes))


def test_all_that_is_wrong_comes_at_once_and_a_huge_card_is_not_read(tmp_path):
    folder = written(tmp_path / "bundle", spacing_mm=None, intensity=None, architecture=None)
    with pytest.raises(BadInput) as caught:
        read_card(tmp_path)
    assert all(f"`{key}`" in str(caught.value) for key in ("spacing_mm", "intensity", "architecture"))
    (folder / "card.json").write_text(" " * (LARGEST_CARD + 1))
    with pytest.raises(BadInput, match="no card of volssl"):
        read_card(folder)
    (folder / "card.json").write_text("[" * 500_000)
    with pytest.raises(BadInput, match="must be JSON"):
        read_card(folder)


def test_what_a_network_must_be_shown():
    assert preparation_of({"spacing_mm": [1, 2, 3], "intensity": CT}) == {
        "spacing_mm": (1, 2, 3),
        "normalisation": "window",
        "window": (-150, 250),
        "patches": "zscore",
    }
    of_mr = preparation_of({"spacing_mm": [1, 1, 1], "intensity": MR})
    assert of_mr == {"spacing_mm": (1, 1, 1), "normalisation": "percentile", "patches": "none"}
    assert Preparation(**of_mr).normalisation == "percentile"


def settings(recipe, *overrides):
    return prepare._settings(recipe, overrides)


@pytest.mark.parametrize("recipe", ["prepare_ct", "prepare_mr"])
def test_prepare_takes_spacing_and_intensity_from_the_card(tmp_path, recipe):
    ct, mr = written(tmp_path / "ct"), written(tmp_path / "mr", intensity=MR)
    made = settings(recipe, f"like={ct}", "body.margin_mm=2")
    assert (made.modality, made.spacing_mm, made.body.margin_mm, made.body.threshold) == ("CT", (1.5, 1.5, 3.0), 2.0, -500.0)
    assert (made.intensity.clip, made.intensity.window, made.intensity.percentiles) == ((-500, 600), (-150, 250), None)
    made = settings(recipe, f"like={mr}")
    assert (made.modality, made.body.threshold, made.body.share) == ("MR", None, 0.1)
    assert (made.intensity.window, made.intensity.percentiles) == ((0, 1000), (1.0, 99.0))


def test_prepare_refuses_what_the_user_set_otherwise_unless_told(tmp_path):
    like = f"like={written(tmp_path / 'ct')}"
    with pytest.raises(BadInput) as caught:
        settings("prepare_ct", like, "spacing_mm=[1,1,1]", "intensity={window: [0, 1]}")
    assert "spacing_mm must be [1.5, 1.5, 3.0]; found [1, 1, 1]" in str(caught.value) and "intensity.window must be" in str(caught.value)
    assert "intensity.clip" not in str(caught.value)
    told = settings("prepare_ct", like, "spacing_mm=[1,1,1]", "accept_mismatch=true")
    assert told.spacing_mm == (1, 1, 1) and told.intensity.window == (-150, 250)
    assert settings("prepare_ct", like, "spacing_mm=[1.5,1.5,3]").spacing_mm == (1.5, 1.5, 3.0)
    with pytest.raises(BadInput, match="goes with `like`"):
        settings("prepare_ct", "accept_mismatch=true")


def test_a_recipe_of_the_users_own_must_agree(tmp_path):
    folder = written(tmp_path / "ct")
    own = tmp_path / "own.yaml"
    save(load("prepare_ct", verb="prepare") | {"like": str(folder)}, own, verb="prepare")
    with pytest.raises(BadInput, match=r"intensity.window must be \[-150, 250\]; found \[-1000.0, 1000.0\]"):
        settings(own)
    save({"like": str(folder), "body": {"threshold": -400.0}}, own, verb="prepare")
    made = settings(own)
    assert (made.spacing_mm, made.body.threshold, made.intensity.window) == ((1.5, 1.5, 3.0), -400.0, (-150, 250))


def test_without_a_bundle_the_recipe_stays_as_it_is():
    values = load("prepare_ct", verb="prepare")
    assert as_card_says(values, "prepare_ct", ()) == values


def test_the_front_matter_of_the_model_card_is_yaml_that_the_hub_knows(tmp_path):
    card = read_card(written(tmp_path / "ct", method='odd: "name" # {'))
    empty, front, body = model_card(card).split("---\n", 2)
    about = yaml.safe_load(front)
    assert empty == "" and "# Encoder pretrained with" in body
    assert about["license"] == "other" and about["license_name"] and about["library_name"] == "volssl"
    assert about["pipeline_tag"] == "image-feature-extraction" and 'odd: "name" # {' in about["tags"] and "ct" in about["tags"]
