"""What to do with options: checks, those of a file, differences between runs by the names of options. No torch."""

from __future__ import annotations

import importlib.util
import itertools
import re
from dataclasses import fields
from pathlib import Path

from dnnlib.errors import UsageError, UserError, public_url
from training.config import ARCHITECTURES, PRECONDS, Kwargs, check_batch, differences, plain
from training.recipe import DISTILLATION, LadderOptions, Options, entries
from training.steps import check_steps

COMMAND_LINE = "command_line"  # the key of training_options.json and ladder-options.json for the options as given
ALTERING = tuple(each.name for each in entries(Options) if each.parts)  # options on which the result depends
LADDER_ALONE = {each.name for each in entries(LadderOptions)} - {each.name for each in entries(Options)}
PARTS = ("network_kwargs", "loss_kwargs", "optimizer_kwargs", "dataset_kwargs", "data_loader_kwargs", "augment_kwargs")
FILES = ("--data", "--transfer")  # compared by their content


def check_options(options: Options, world_size: int) -> None:
    """Raises UsageError or UserError for options that contradict each other or lack something."""
    check_batch(options.batch, options.batch_gpu, world_size)
    state = Path(options.resume or "latest")
    if options.resume not in (None, "latest") and (state.suffix in (".pkl", ".safetensors") or not state.is_file()):
        raise UserError(f"--resume={options.resume} is not a training state (training-state-*.pt, or latest)")
    if options.desc is not None and (re.search(r"[/\\]", options.desc) or not options.desc.isprintable()):
        raise UsageError(f"--desc={options.desc} becomes part of a folder's name: no slash, nothing unprintable")
    for name in ("tensorboard", "wandb"):
        if getattr(options, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"--{name} needs the package {name}: pip install {name}")
    if options.fp16 and options.precision not in (None, "fp16"):
        raise UsageError(f"--fp16=1 contradicts --precision={options.precision}")
    if options.distils:
        if options.transfer is None:
            raise UsageError("--precond=edm_distillation needs a teacher: --transfer=FILE or URL of a network")
        check_steps(options.num_steps, options.ratio)
    for precond in (DISTILLATION, "edm"):
        own = [each for each in entries(Options) if each.only == precond != options.precond]
        if wrong := [each.flag for each in own if getattr(options, each.name) != each.default]:
            raise UsageError(f"{', '.join(wrong)} belong{'s' * (len(wrong) == 1)} to --precond={precond}")


def given(options: Options) -> Kwargs:
    """The options that differ from their defaults, as a file holds them. Not `resume`: that is about one start."""
    values = [(each, getattr(options, each.name)) for each in fields(Options) if each.name != "resume"]
    named = {each.name: value for each, value in values if value != each.default}
    return {name: public_url(value) if isinstance(value, str) else value for name, value in named.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Identities of runs (training.recipe: TrainConfig.identity) in terms of options

WITHOUT_OPTION = {
    **{"data.3": "resolution", "data.4": "number of images"},
    **{"lr.1": "betas", "lr.2": "eps", "ema.1": "EMA ramp-up ratio"},
}
EDM_DEFAULTS = {"network.sigma_data": 0.5, "loss.sigma_data": 0.5, "loss.P_mean": -1.2, "loss.P_std": 1.2}
FOLLOWS = {"--num_steps": ("distillation.", "--grid"), "--augment": ("augment.", "network.augment_dim")}


def named_differences(saved: Kwargs, identity: Kwargs) -> list[str]:
    """The options that alter the result and differ between two identities, with both values; what has no option is
    named as `training_options.json` has it, and left out where it follows from an option that differs."""
    old, new = as_options(saved), as_options(identity)
    hidden = [each for cause, follow in FOLLOWS.items() if old.get(cause) != new.get(cause) for each in follow]
    if None in (old.get("--duration"), new.get("--duration")):  # part of an identity only with --lr-decay
        hidden.append("--duration")
    names = [name for name in [*new, *old] if not name.startswith(tuple(hidden))]
    return differences(*({name: each.get(name) for name in names} for each in (old, new)))


def by_content(options: Kwargs) -> Kwargs:
    """Values by the names of options, with those named that are compared by what a file holds."""
    return {f"the content of {name}" if name in FILES else name: value for name, value in options.items()}


def as_options(identity: Kwargs) -> Kwargs:
    """An identity as people know it: by the options of `train.py`, in their units, with the defaults of those that did
    not exist when it was written. What has no option has the name of its part."""
    parts: Kwargs = {}
    for name, value in plain(identity).items():
        inner = dict(enumerate(value)) if value and isinstance(value, list) else value
        parts |= {f"{name}.{key}": each for key, each in inner.items()} if isinstance(inner, dict) else {name: value}
    if parts.get("ema.0") == "std":
        parts["ema.std"] = parts.pop("ema.1", None)
        del parts["ema.0"]
    if parts.get("augment", ...) is None:
        parts["augment.p"] = 0.0
    named: Kwargs = {}
    table = {part: each for each in reversed(entries(Options)) for part in each.parts}
    for part, value in parts.items():
        option = table.get(part)
        if option and option.scale != 1 and isinstance(value, (int, float)):
            value = value / option.scale / (1000 if part == "duration" else 1)  # an identity has that one in images
        if part not in EDM_DEFAULTS or value != EDM_DEFAULTS[part]:
            named[option.flag if option else WITHOUT_OPTION.get(part, part)] = value
    for option in entries(Options):
        if option.alters is True and "." not in option.parts[0] and named.get(option.flag) is None:
            named[option.flag] = option.usual(bool(identity.get("distillation")))
    return by_content(named)


# ---------------------------------------------------------------------------------------------------------------------
# --config: options from a file. These raise ValueError with the reason for a file that can't be used.


def options_of_file(content: Kwargs) -> Kwargs:
    """Values for train.py's options from a run's `training_options.json`: what was given then, and its seed.

    A file of EDM's own code lacks our key; its settings are turned into the options that come to the same.
    """
    if COMMAND_LINE in content:
        values = _object(content, COMMAND_LINE)
        if LADDER_ALONE & values.keys():
            raise ValueError("it is a ladder's; distill.py takes it")
        return {"seed": content.get("seed"), **values}
    if "identity" in content:
        raise ValueError("it does not list the options of its run (its key 'command_line' is missing)")
    if "network_kwargs" in content:
        return _options_of_edm(content)
    raise ValueError("it is no training_options.json: it has neither 'command_line' nor 'network_kwargs'")


def ladder_options_of_file(content: Kwargs) -> Kwargs:
    """Values for distill.py's options from a ladder's `ladder-options.json`."""
    if COMMAND_LINE not in content or "run_dir" in content:
        raise ValueError("it is no ladder-options.json, which distill.py leaves in its --outdir")
    return _object(content, COMMAND_LINE)


def _options_of_edm(content: Kwargs) -> Kwargs:
    """What EDM's settings are as options; --outdir is not among them. Refuses what no option sets."""
    if content.get("resume_state_dump"):
        raise ValueError("its run resumed from a training state of EDM's code, which is not read here")
    content = {**content, "augment_kwargs": content.get("augment_kwargs") or {"p": 0}}
    parts = {name: _object(content, name) for name in PARTS}
    known = content | {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}
    found = {each.name: known[each.place] for each in entries(Options) if each.place in known}
    for each in entries(Options):
        if each.scale != 1 and each.name in found:
            if not isinstance(found[each.name], (int, float)):
                raise ValueError(f"its '{each.place}' is no number")
            found[each.name] /= each.scale
    adam = {"class_name": "torch.optim.Adam", "betas": [0.9, 0.999], "eps": 1e-8}
    for arch, precond in itertools.product(ARCHITECTURES, PRECONDS):
        options = Options(**{"outdir": "", "data": "", **found, "arch": arch, "precond": precond})
        usual = dict(zip(PARTS, (*options.filled().fresh_kwargs(), adam | {"lr": found.get("lr")}), strict=False))
        if all(usual[name] | parts[name] == usual[name] for name in usual):
            return {**found, "arch": arch, "precond": precond}
    raise ValueError(f"no options set its {', '.join(PARTS[:3])} so")


def _object(content: Kwargs, key: str) -> Kwargs:
    value = content.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"its '{key}' is no JSON object")
    return value
