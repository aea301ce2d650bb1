"""The recipe of a study: its arms, each with its recipes of pretraining and fine-tuning, and what keeps them from running."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from volssl import finetune, pretrain
from volssl import recipe as recipes
from volssl.datasets import CaseTable
from volssl.export import bundle
from volssl.files import BadInput
from volssl.holdout import Split
from volssl.prepare import Settings, about_of
from volssl.starting import first_weights, plan_of
from volssl.store import Store

SCRATCH = "scratch"
# What an arm may set for itself in the fine-tuning: how weights come over. Anything else would give arms different budgets.
OWN = {"weights": None, "optimisation": ("encoder", "accept_mismatch")}


@dataclass(frozen=True)
class Design:
    """What is compared at which points.

    Attributes: labels: counts of labelled patients, drawn from the pretraining share; a smaller draw lies inside a larger. seeds: of the
        draws, first weights and order of the patches, the same for every arm. folds: how many test sets, see `holdout.divided`.
        pretraining_seeds: pretrainings per arm and fold; the i-th seed takes the one numbered i modulo them. threads: of every process;
        a setting, since results depend on it in the last bits. worth: a gain that is ruled out if the interval ends below it. overlays:
        test cases to draw. quick: set by --quick: a trial, which says so wherever it answers.
    """

    labels: tuple[int, ...] = (5, 10)
    seeds: tuple[int, ...] = (0, 1, 2)
    folds: int = 1
    pretraining_seeds: int = 1
    threads: int = 1
    worth: float = 0.01
    overlays: int = 3
    quick: bool = False

    def __post_init__(self) -> None:
        faults = [
            f"{name} must be different whole numbers >= {least}, rising; found {values}"
            for name, values, least in (("labels", self.labels, 1), ("seeds", self.seeds, 0))
            if not values or list(values) != sorted(set(values)) or values[0] < least
        ]
        if min(self.folds, self.pretraining_seeds, self.threads) < 1 or self.worth < 0 or self.overlays < 0:
            faults.append("folds, pretraining_seeds and threads >= 1, worth and overlays >= 0 must hold")
        if faults:
            raise BadInput("; ".join(faults))


@dataclass(frozen=True)
class Tuning:
    """The search for the peak learning rate, the same for every arm, on the validation cases.

    Attributes: lr: what is tried. seeds: with how many of the seeds. at: numbers of labels at which it is tried, all together, for one
        learning rate per arm; none: at each, for itself.
    """

    lr: tuple[float, ...] = (1e-3,)
    seeds: int = 1
    at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.lr or min(self.lr) <= 0 or len(set(self.lr)) < len(self.lr) or self.seeds < 1:
            raise BadInput(f"lr must be different numbers > 0, seeds >= 1; found {self.lr}, {self.seeds}")


@dataclass(frozen=True)
class Written:
    """An arm as a recipe has it. scratch has nothing; the others a `bundle` (with `images`, a table of the content hashes of what it was
    pretrained on) or `pretrain`, laid over the study's. finetune: settings of the transfer."""

    bundle: str | None = None
    images: str | None = None
    pretrain: dict[str, Any] | None = None
    finetune: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One arm. pretrain: its recipe, or None; bundle: a given one, or None. finetune: its recipe. own: what is its own in that. pretrained:
    the first arm with the same recipe of pretraining, whose weights this one takes."""

    name: str
    finetune: dict[str, Any]
    pretrain: dict[str, Any] | None = None
    bundle: Path | None = None
    images: Path | None = None
    own: dict[str, Any] = field(default_factory=dict)
    pretrained: str = ""


@dataclass(frozen=True)
class Plan:
    """A study's recipe, checked. values: as written. prepare: of the images that are pretrained on, if any are. arms: scratch first."""

    values: dict[str, Any]
    split: Split
    design: Design
    tuning: Tuning
    prepare: Settings | None
    arms: tuple[Arm, ...]


PARTS = {
    "split": Split,
    "design": Design,
    "tuning": Tuning,
    "prepare": dict[str, Any] | None,
    "pretrain": dict[str, Any] | None,
    "finetune": dict[str, Any],
    "arms": dict[str, dict[str, Any] | None],
}


def planned(values: dict[str, Any], where: str) -> Plan:
    """Check a study's recipe and those of all its arms. Raises: BadInput: with all complaints at once."""
    made = recipes.parse(values, PARTS, where)
    complaints: list[str] = []
    settings = _tried(complaints, "", lambda: _prepare(made, where))
    arms = [_tried(complaints, f"arms.{name}: ", lambda n=name, g=given: _arm(n, g or {}, made)) for name, given in made["arms"].items()]
    if SCRATCH not in made["arms"]:
        complaints.append(f"arms: must hold {SCRATCH}, without which nothing can be compared; found {', '.join(made['arms']) or 'none'}")
    if len(made["arms"]) < 2:
        complaints.append("arms: must hold scratch and at least one other")
    if made["tuning"].seeds > len(made["design"].seeds):
        complaints.append(f"tuning.seeds: must be at most the {len(made['design'].seeds)} of design.seeds; found {made['tuning'].seeds}")
    if strange := sorted(set(made["tuning"].at) - set(made["design"].labels)):
        complaints.append(f"tuning.at: must be among design.labels; found {strange}")
    if complaints:
        raise BadInput(f"recipe {where}: {len(complaints)} fault(s); mend them:\n  " + "\n  ".join(complaints))
    ordered = sorted((arm for arm in arms if arm is not None), key=lambda arm: arm.name != SCRATCH)
    return Plan(values, made["split"], made["design"], made["tuning"], settings, tuple(_sharing(ordered)))


def _sharing(arms: Sequence[Arm]) -> list[Arm]:
    # Arms that differ in the transfer alone need one pretraining between them.
    first: dict[str, str] = {}
    owners = [first.setdefault(json.dumps(arm.pretrain, sort_keys=True), arm.name) if arm.pretrain is not None else "" for arm in arms]
    return [dataclasses.replace(arm, pretrained=owner) for arm, owner in zip(arms, owners, strict=True)]


def _tried(complaints: list[str], prefix: str, work: Any) -> Any:
    try:
        return work()
    except BadInput as error:
        complaints.append(f"{prefix}{error}")
        return None


def _prepare(made: dict[str, Any], where: str) -> Settings | None:
    if not any(given and given.get("pretrain") is not None for given in made["arms"].values()):
        return None
    if made["prepare"] is None:
        raise BadInput("prepare: must say how images become a store, for the arms that are pretrained here; found nothing")
    return recipes.parse({"prepare": _resolved(made["prepare"], {}, verb="prepare")}, {"prepare": Settings}, where)["prepare"]


def _resolved(base: Mapping[str, Any], over: Mapping[str, Any], *, verb: str) -> dict[str, Any]:
    # `recipe:` names the file that the other keys are laid over.
    below = recipes.load(base["recipe"], verb=verb) if "recipe" in base else {}
    return recipes.laid_over(recipes.laid_over(below, {key: value for key, value in base.items() if key != "recipe"}), over)


def _arm(name: str, given: dict[str, Any], made: dict[str, Any]) -> Arm:
    if not name.replace("_", "").replace("-", "").isalnum():
        raise BadInput("its name must be letters, digits, _ or -")
    written: Written = recipes.parse({"arm": given}, {"arm": Written}, name)["arm"]
    faults = _strange(written.finetune)
    sources = [key for key in ("bundle", "pretrain") if getattr(written, key) is not None]
    if name == SCRATCH and sources:
        faults.append(f"must start from nothing; found {', '.join(sources)}")
    if name != SCRATCH and len(sources) != 1:
        faults.append(f"must hold either bundle or pretrain; found {' and '.join(sources) or 'neither'}")
    if written.images is not None and written.bundle is None:
        faults.append("images goes with a bundle; found none")
    if faults:
        raise BadInput("; ".join(faults))
    tuned = _resolved(made["finetune"], written.finetune, verb="finetune")
    recipes.parse(tuned, finetune.PARTS, f"{name}, finetune")
    pretrained = None
    if written.pretrain is not None:
        pretrained = _resolved(made["pretrain"] or {}, written.pretrain, verb="pretrain")
        recipes.parse(pretrained, pretrain.PARTS, f"{name}, pretrain")
    paths = [Path(path) if path is not None else None for path in (written.bundle, written.images)]
    return Arm(name, tuned, pretrained, paths[0], paths[1], written.finetune)


def _strange(own: Mapping[str, Any]) -> list[str]:
    faults = []
    for key, value in own.items():
        inside = OWN.get(key, ())
        if inside is None:
            continue
        faults += [
            f"finetune.{dotted}: is the same for all arms, so that none has another budget; set it under `finetune:` of the study"
            for dotted in ([f"{key}.{name}" for name in value if name not in inside] if isinstance(value, Mapping) and inside else [key])
        ]
    return faults


def faults_of(plan: Plan, table: CaseTable, spacings_mm: Collection[tuple[float, ...]]) -> list[str]:
    """What keeps an arm from running: a patch or a view that its network cannot take, weights or voxels that do not fit.

    Args: spacings_mm: those of the images.
    """
    complaints: list[str] = []
    for arm in plan.arms:
        _tried(complaints, f"arms.{arm.name}: ", lambda a=arm: _fits(a, plan, table, spacings_mm))
    return complaints


def _fits(arm: Arm, plan: Plan, table: CaseTable, spacings_mm: Collection[tuple[float, ...]]) -> None:
    made = recipes.parse(arm.finetune, finetune.PARTS, arm.name)
    given = bundle.load_bundle(arm.bundle) if arm.bundle is not None else None
    if arm.pretrain is not None:
        given = _untrained(arm.pretrain, plan)
    prepared = plan_of(made, table, given)
    first_weights(prepared, given, made=made, seed=0)
    if given is None or prepared.preparation.spacing_mm is not None:
        return
    if made["optimisation"].accept_mismatch or made["weights"].across_modalities:
        return
    wanted = tuple(given.card["spacing_mm"])
    if other := [found for found in spacings_mm if not np.allclose(found, wanted, rtol=0.02)]:
        raise BadInput(
            f"finetune.preparation.spacing_mm is null, so every image must have the bundle's voxels of {wanted} mm; "
            f"found {other[0]} mm too; set it to {list(wanted)}"
        )


def _untrained(values: dict[str, Any], plan: Plan) -> bundle.Bundle:
    """The bundle that a pretraining recipe would leave, before its first step."""
    assert plan.prepare is not None
    made = recipes.parse(values, pretrain.PARTS, "pretrain")
    method = pretrain.method_of(made)
    method.check(made["patches"].box_vox, made["patches"].batch_size)
    card = pretrain.card_of(made, values, Store(Path(), about_of(plan.prepare), []), method)
    about = dataclasses.asdict(card) | {"decoder": {"skips": bool(method.net.decoder.skips)}}
    return bundle.Bundle(method.encoder.state_dict(), about, method.net.decoder.state_dict())


def shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """A study of minutes from a recipe of hours, to see that it runs: scratch and the first other arm, two numbers of labels, one seed."""
    values = recipes.laid_over(values, {})
    arms = values.get("arms") or {}
    others = [name for name in arms if name != SCRATCH]
    values["arms"] = {name: _brief(arms[name] or {}) for name in (SCRATCH, *others[:1]) if name in arms}
    design = values.setdefault("design", {})
    labels = sorted(_numbers(design.get("labels", Design().labels)))[:2]
    values["design"] = design | {"labels": labels, "seeds": [0], "folds": 1, "pretraining_seeds": 1, "quick": True}
    tuning = values.get("tuning") or {}
    values["tuning"] = tuning | {"lr": list(tuning.get("lr", Tuning().lr))[:2], "seeds": 1, "at": []}
    if (values.get("split") or {}).get("file") is None:
        split = values.get("split") or {}
        develop = 1 if split.get("develop") else 0
        values["split"] = split | {"pretrain": max([*labels, 2]) + develop, "validation": 1, "test": 2, "develop": develop}
    few = {"optimisation": {"steps": 4}, "saving": {"log_every": 1}}
    values["finetune"] = recipes.laid_over(values.get("finetune") or {}, few)
    return values


def _brief(arm: dict[str, Any]) -> dict[str, Any]:
    few = {"training": {"steps": 3}, "saving": {"health_every": 0, "probe_every": 0, "log_every": 1}}
    return arm | ({"pretrain": recipes.laid_over(arm["pretrain"], few)} if isinstance(arm.get("pretrain"), dict) else {})


def _numbers(values: Sequence[Any]) -> list[int]:
    return [int(value) for value in values]
