"""Verb pretrain: train a method on a prepared store, and leave a bundle. The step is in `_train`; the rest is the run around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import volssl
from volssl import export, processes
from volssl import recipe as recipes
from volssl.averages import keep_mean
from volssl.checkpoints import Checkpoints, StopSignal, Terms
from volssl.export import bundle
from volssl.files import BadInput, Outcome, claim_out, track
from volssl.journal import Clock, Journal, write_environment
from volssl.methods.method import AbstractMethod
from volssl.patches import PatchPlan, PatchStream, Source, deaths_told
from volssl.running import Run, Training, open_fabric, scaler_of, start, training_batches, views_of, world_size
from volssl.schedule import warmup_cosine
from volssl.store import Store
from volssl.watch import Saving, look, look_at_untrained

PARTS = {"net": "nets", "method": "methods", "patches": PatchPlan, "training": Training, "saving": Saving, "export": str | list[str] | None}


def run(
    recipe: str | Path,
    *,
    store: Path,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
) -> Outcome:
    """Pretrain by `recipe` on the store and leave a run folder with a bundle.

    Args: recipe: path or name of a shipped recipe. store: from `volssl prepare`. out: the run. resume: continue from its last checkpoint,
        to the bit. overrides: `key=value` over the recipe; on resume the run's own recipe must be asked for again.
    Raises: BadInput: before step 0 for anything that cannot work; NotFinite: for a loss that is not finite.
    """
    values = recipes.load(recipe, overrides, verb="pretrain")
    made = recipes.parse(values, PARTS, str(recipe))
    opened = Store.open(Path(store))
    formats = export.checked(made["export"])
    method = method_of(made)
    method.check(made["patches"].box_vox, made["patches"].batch_size * world_size())
    training = made["training"]
    PatchStream(opened, made["patches"], source=Source(seed=training.seed), steps=1)
    card = card_of(made, values, opened, method)
    bundle.prove(method.encoder, card, decoder=method.net.decoder, formats=formats)
    fabric = open_fabric(training.precision)
    out = Path(out)
    if processes.rank() == 0:
        claim_out(out, resume=resume, overwrite=overwrite, inputs=(opened.path,))
        _same_recipe(out, values, resume=resume)
    fabric.barrier()
    current = start(fabric, method, made, store=opened, out=out)
    checkpoints = Checkpoints(out, made["saving"].checkpoint_every, made["saving"].checkpoint_minutes)
    if resume and (state := checkpoints.load()) is not None:
        current.restore(state)
    if processes.rank() == 0:
        write_environment(out, device=fabric.device, precision=str(fabric._precision.precision), seed=training.seed)
    with StopSignal() as stop, Journal(out, steps_done=current.steps_done, silent=processes.rank() > 0) as journal, deaths_told():
        if current.steps_done == 0:
            look_at_untrained(current, made["saving"], journal)
        _train(current, made["saving"], checkpoints, journal, stop)
    if current.steps_done < training.steps:
        return Outcome(out, message=f"stopped by a signal after step {current.steps_done}; continue with --resume", finished=False)
    if processes.rank() == 0:
        finished = dataclasses.replace(card, steps=current.steps_done)
        bundle.write(out / "bundle", current.kept.encoder, finished, decoder=current.kept.decoder)
        for to in formats:
            if to != "bundle":
                export.run(out / "bundle", to=to, out=out / to, overwrite=True)
    return Outcome(out, message=f"{training.steps} steps done; weights in bundle/")


def method_of(made: dict[str, Any]) -> AbstractMethod:
    """The method and its network as a recipe's parts say."""
    # The first weights depend on the seed alone, whatever ran in this process before.
    with torch.random.fork_rng():
        torch.manual_seed(made["training"].seed)
        return made["method"].build(made["net"].build())


def _same_recipe(out: Path, values: dict[str, Any], *, resume: bool) -> None:
    path = out / "recipe.yaml"
    if resume and any(out.iterdir()) and not path.exists():
        raise BadInput(f"--resume {out}: must be a run that pretrain began, or empty; found no recipe.yaml in it; choose another folder")
    if resume and path.exists():
        before = recipes.load(path, verb="pretrain")
        changed = sorted(key for key in before.keys() | values.keys() if before.get(key) != values.get(key) and key != "saving")
        if changed:
            raise BadInput(
                f"--resume: the recipe must be the one the run began with; found other values under {', '.join(changed)}; start a new run"
            )
    recipes.save(values, path, verb="pretrain")


def _train(current: Run, saving: Saving, checkpoints: Checkpoints, journal: Journal, stop: StopSignal) -> None:
    """The training loop: views, then per turn backward and step, then what is due is written."""
    training, fabric = current.training, current.fabric
    per_step = training.accumulate
    batches = training_batches(current, steps=training.steps * per_step, first=current.steps_done * per_step)
    clock = Clock()
    earlier: Terms | None = None
    remaining = range(current.steps_done, training.steps)
    for step in track(remaining, total=training.steps, label="pretrain", start=current.steps_done):
        with clock.waiting():
            patches = [next(batches) for _ in range(per_step)]
        views, sums = play(current, patches, step)
        scans = [scan for batch in patches for scan in batch.scan_ids]
        clock.samples += len(scans)
        terms = Terms(sums, step=step, scans=scans, forgiven=sums if scaler_of(fabric) else ())
        if earlier is not None:
            earlier.read()
        earlier = terms
        if saving.due(current.steps_done) or current.steps_done == training.steps or checkpoints.due(current.steps_done):
            numbers = terms.read() | {"lr": lr_of(training, step)}
            _write_what_is_due(current, saving, checkpoints, journal, numbers=numbers, clock=clock, views=views[0])
        if processes.mean(float(stop.asked), fabric.device) > 0:
            break
    if earlier is not None:
        earlier.read()
    checkpoints.save(current.state())


def play(current: Run, patches: list[Any], step: int) -> tuple[list[Any], dict[str, Tensor]]:
    """One step on its batches: views, then per turn backward and step. Returns the views and the terms, which nobody has waited for."""
    training = current.training
    views = [views_of(current, batch, step * training.accumulate + i) for i, batch in enumerate(patches)]
    sums: dict[str, Tensor] = {}
    for party, losses in _turns(current, views, step / training.steps):
        sums |= losses | {f"grad_norm/{party}": _step(current, party, lr_of(training, step))}
    current.method.after_step(step / training.steps)
    if current.averaged is not None:
        keep_mean(current.averaged, current.method.net, average=training.average, step=step)
    current.steps_done = step + 1
    return views, sums


def lr_of(training: Training, step: int) -> float:
    """Learning rate of a step: warm-up, then cosine."""
    return training.lr * warmup_cosine((step + 1) / training.steps, warmup=training.warmup)


def _turns(current: Run, views: list[Any], progress: float) -> Iterator[tuple[str, dict[str, Tensor]]]:
    # All batches of an accumulated step play the same turn, then its party steps, then the next turn begins.
    plays = [current.method.turns(of_batch, progress) for of_batch in views]
    share = 1 / len(plays)
    while True:
        party, sums = "", {}
        for play in plays:
            with current.fabric.autocast():
                turn = next(play, None)
            if turn is None:
                return
            party, losses = turn
            for name, value in losses.items():
                sums[f"loss/{name}"] = sums.get(f"loss/{name}", 0.0) + share * value.detach()
            current.fabric.backward(torch.stack(list(losses.values())).sum() * share)
        yield party, sums


def _step(current: Run, party: str, lr: float) -> Tensor:
    # Nothing here waits for the device: `Terms` reads the norm with the losses.
    optimizer, clip = current.optimizers[party], current.training.clip
    processes.average_gradients(current.method.parameters())
    norm = current.fabric.clip_gradients(current.method, optimizer, max_norm=clip or float("inf"), error_if_nonfinite=False)
    assert norm is not None
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _write_what_is_due(
    current: Run, saving: Saving, checkpoints: Checkpoints, journal: Journal, *, numbers: dict[str, float], clock: Clock, views: Any
) -> None:
    step, last = current.steps_done, current.steps_done == current.training.steps
    if step % saving.log_every == 0 or last:
        numbers = processes.mean_of(numbers, current.fabric.device)
        journal.log(step=step, progress=step / current.training.steps, **clock.read(), **numbers)
    look(current, saving, checkpoints, journal, views=views)
    if checkpoints.due(step):
        checkpoints.save(current.state())


def card_of(made: dict[str, Any], values: dict[str, Any], store: Store, method: AbstractMethod) -> bundle.Card:
    """The card of a bundle that this recipe, with this method, trains on this store."""
    net = made["net"]
    arguments = dict(method.net.arguments)
    train = [row for row in store.rows if row.split == "train"]
    return bundle.Card(
        architecture={"name": net.name, "arguments": arguments},
        in_channels=arguments["in_channels"],
        spacing_mm=store.spacing_mm,
        orientation=store.about.orientation,
        intensity={
            "modality": store.about.modality,
            "clip": list(store.about.clip),
            "window": list(store.window),
            "percentiles": (store.about.recipe.get("intensity") or {}).get("percentiles"),
            "normalisation": method.normalisation,
        },
        method=made["method"].name,
        recipe=values,
        steps=0,
        data={"train_scans": len(train), "train_patients": len({row.patient_id for row in train})},
        volssl_version=volssl.__version__,
        citations=(method.citation,),
        patch_vox=method.view_vox,
    )
