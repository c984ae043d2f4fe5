"""What to do with options: checks, those of a file, differences between runs by the names of options. No torch."""

from __future__ import annotations

import difflib
import importlib.util
import re
from dataclasses import MISSING, fields
from pathlib import Path

from dnnlib.errors import UsageError, UserError, public_url
from training.config import ARCHITECTURES, PRECONDS, Kwargs, check_batch, differences, plain
from training.recipe import DISTILLATION, LadderOptions, Options, entries
from training.steps import check_steps

COMMAND_LINE = "command_line"  # the key of training_options.json and ladder-options.json for the options as given
ALTERING = tuple(each.name for each in entries(Options) if each.parts)  # options on which the result depends
LADDER_ALONE = {each.name for each in entries(LadderOptions)} - {each.name for each in entries(Options)}
FILES = ("--data", "--transfer")  # compared by their content


def _age(path: Path) -> float:
    return -path.stat().st_mtime


def _no_state(name: str) -> str:
    """What is wrong with a --resume that is no file, or no state."""
    if Path(name).suffix in (".pkl", ".safetensors") and Path(name).is_file():
        beside = Path(name).with_name(Path(name).stem.replace("network-snapshot", "training-state") + ".pt")
        is_state = beside.is_file() and beside.name.startswith("training-state")
        states = [beside] if is_state else sorted(Path(name).parent.glob("training-state-*.pt"), key=_age)
        where = f"{states[0]} lies beside it" if states else "there is none beside it; --transfer takes a network"
        return f"is a network snapshot, not a training state, from which a run resumes; {where}"
    if difflib.get_close_matches(name, ["latest"], cutoff=0.7):
        return "there is no such file; did you mean 'latest'?"
    if not Path(name).is_dir():
        return "there is no such training state (training-state-*.pt, or latest)"
    found = [*Path(name).glob("training-state-*.pt"), *Path(name).glob("*/training-state-*.pt")]
    newest = f"the newest training state in it is {min(found, key=_age)}" if found else ""
    return f"is a folder, a file is needed; {newest or 'there is no training state in it'}"


def check_options(options: Options, world_size: int) -> None:
    """Refuses options that contradict each other or lack something, before anything else is looked at.

    Raises UsageError or UserError with one helpful line.
    """
    check_batch(options.batch, options.batch_gpu, world_size)
    snapshot = Path(options.resume or "").suffix in (".pkl", ".safetensors")
    if options.resume not in (None, "latest") and (snapshot or not Path(options.resume).is_file()):
        raise UserError(f"--resume={options.resume}: {_no_state(options.resume)}")
    for name in ("outdir", "data"):
        if not getattr(options, name):
            raise UsageError(f"--{name} is empty")
    if options.desc is not None and (re.search(r"[/\\]", options.desc) or not options.desc.isprintable()):
        raise UsageError(
            f"--desc={options.desc} becomes part of a folder's name, which can't hold a slash, or what isn't printed"
        )
    for name in ("tensorboard", "wandb"):
        if getattr(options, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"--{name} needs the package {name}: pip install {name}")
    if options.fp16 and options.precision not in (None, "fp16"):
        raise UsageError(f"--fp16=1 contradicts --precision={options.precision}")
    if options.distils:
        if options.transfer is None:
            raise UsageError("--precond=edm_distillation needs a teacher: --transfer=FILE or URL of a network")
        check_steps(options.num_steps, options.ratio)
        for name in _changed(options, "edm"):
            raise UsageError(f"{name} has no meaning in distillation, whose noise levels are the teacher's")
        return
    for precond in (DISTILLATION, "edm"):
        wrong = _changed(options, precond)
        if wrong and precond != options.precond:
            verb = "belongs" if len(wrong) == 1 else "belong"
            raise UsageError(
                f"{', '.join(wrong[:-1])}{' and ' * (len(wrong) > 1)}{wrong[-1]} {verb} to --precond={precond}"
            )


def _changed(options: Options, only: str) -> list[str]:
    """The options of one --precond, as they are typed, that have another value than their default."""
    return [each.flag for each in entries(Options) if each.only == only and getattr(options, each.name) != each.default]


def given(options: Options) -> Kwargs:
    """The options that differ from their defaults, as a file holds them. Not `resume`: that is about one start."""
    values = {each.name: getattr(options, each.name) for each in fields(Options) if each.name != "resume"}
    defaults = {each.name: each.default for each in fields(Options) if each.default is not MISSING}
    named = {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}
    return {name: public_url(value) if isinstance(value, str) else value for name, value in named.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Identities of runs (config.TrainConfig.identity) in terms of options

_WITHOUT_OPTION = {
    **{"data.3": "resolution", "data.4": "number of images"},
    **{"lr.1": "betas", "lr.2": "eps", "ema.1": "EMA ramp-up ratio"},
}


def named_differences(saved: Kwargs, identity: Kwargs) -> list[str]:
    """The options that alter the result and differ between two identities, with both values; what has no option is
    named as `training_options.json` has it."""
    old, new = completed(without_defaults(saved)), completed(without_defaults(identity))
    exact = differences(old, new)
    return told_as_options(old, new) or exact if exact else []


def by_content(options: Kwargs) -> Kwargs:
    """Values by the names of options, with those named that are compared by what a file holds."""
    return {f"the content of {name}" if name in FILES else name: value for name, value in options.items()}


def as_options(identity: Kwargs) -> Kwargs:
    """An identity as people know it: by the options of `train.py`, in their units, and what has no option by name."""
    parts: Kwargs = {}
    for name, value in plain(completed(identity)).items():
        if name == "ema" and isinstance(value, list) and len(value) == 2 and value[0] == "std":
            parts["ema.std"] = value[1]
        elif isinstance(value, list):
            parts |= {f"{name}.{index}": part for index, part in enumerate(value)}
        elif isinstance(value, dict):
            parts |= {f"{name}.{key}": part for key, part in value.items()}
        elif name == "augment":
            parts["augment.p"] = 0.0
        else:
            parts[name] = value
    names = {part: each.flag for each in reversed(entries(Options)) for part in each.parts}
    named = by_content({names.get(part, _WITHOUT_OPTION.get(part, part)): value for part, value in parts.items()})
    if isinstance(named.get("--cres"), list):
        named["--cres"] = ",".join(map(str, named["--cres"]))
    for each in entries(Options):
        if isinstance(named.get(each.flag), (int, float)) and each.scale != 1:
            named[each.flag] /= each.scale * (1000 if each.name == "duration" else 1)  # an identity has it in images
    return named


def completed(identity: Kwargs) -> Kwargs:
    """An identity with the defaults of options that did not exist when it was written."""
    distils = bool(identity.get("distillation"))
    later = {each.parts[0]: (each.usual(distils), each.scale) for each in entries(Options) if each.alters is True}
    missing = {
        part: value if scale == 1 else value * scale
        for part, (value, scale) in later.items()
        if "." not in part and identity.get(part) is None and value is not None
    }
    return identity | missing


def without_defaults(identity: Kwargs) -> Kwargs:
    """An identity without what EDM's loss and preconditioning would have by default."""
    usual = {"sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2}
    lean = dict(identity)
    for part in ("loss", "network"):
        named = lean.get(part)
        if isinstance(named, dict) and str(named.get("class_name")).endswith((".EDMLoss", ".EDMPrecond")):
            lean[part] = {name: value for name, value in named.items() if value != usual.get(name, ...)}
    return lean


def told_as_options(old: Kwargs, new: Kwargs) -> list[str]:
    """`differences` of two identities, by the names of options; what follows from another difference is left out."""
    before, now = as_options(old), as_options(new)
    before, now = ({name: each.get(name) for name in [*now, *before]} for each in (before, now))
    for cause, follows in (
        ("--lr-decay", "--duration"),  # part of an identity only with a decay
        ("--num_steps", "distillation."),
        ("--augment", "augment."),
        ("--augment", "network.augment_dim"),
    ):
        if before.get(cause) != now.get(cause) and (
            follows != "--duration" or None in (before.get(follows), now.get(follows))
        ):
            now = {name: value for name, value in now.items() if not name.startswith(follows)}
    return differences(before, now)


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
        raise ValueError("it does not tell the options of its run (its key 'command_line' is missing)")
    if "network_kwargs" in content:
        return _options_of_edm(content)
    raise ValueError("it is no training_options.json: it has neither 'command_line' nor 'network_kwargs'")


def ladder_options_of_file(content: Kwargs) -> Kwargs:
    """Values for distill.py's options from a ladder's `ladder-options.json`."""
    if COMMAND_LINE not in content or "run_dir" in content:
        raise ValueError("it is no ladder-options.json, which distill.py leaves in its --outdir")
    return _object(content, COMMAND_LINE)


def _options_of_edm(content: Kwargs) -> Kwargs:
    """What EDM's settings are as options; --outdir is not among them. Refuses what no option can say."""
    network, data = _object(content, "network_kwargs"), _object(content, "dataset_kwargs")
    optimizer = _object(content, "optimizer_kwargs")
    if content.get("resume_state_dump"):
        raise ValueError("its run went on from a training state of EDM's code, which is not read here")
    precond = _precond(network, _object(content, "loss_kwargs"))
    arch = "adm" if network.get("model_type") == "DhariwalUNet" else "ncsnpp"
    if network.get("embedding_type") == "positional":
        arch = "ddpmpp"
    own = {each.place.removeprefix("network_kwargs.") for each in entries(Options)} | {"class_name", "augment_dim"}
    usual = {name: value for name, value in ARCHITECTURES[arch].items() if name not in own}
    _check_same("network_kwargs", {name: value for name, value in network.items() if name not in own}, usual)
    adam = {"class_name": "torch.optim.Adam", "betas": [0.9, 0.999], "eps": 1e-8}
    _check_same("optimizer_kwargs", {name: value for name, value in optimizer.items() if name != "lr"}, adam)
    augment = _object(content, "augment_kwargs") if content.get("augment_kwargs") else {"p": 0}
    parts = {
        "dataset_kwargs": data,
        "data_loader_kwargs": _object(content, "data_loader_kwargs"),
        "network_kwargs": network,
        "optimizer_kwargs": optimizer,
        "augment_kwargs": augment,
    }
    known = content | {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    found = {each.name: known[each.place] for each in entries(Options) if each.place in known}
    scaled = {each.name: _scaled(content, each.place, each.scale) for each in entries(Options) if each.scale != 1}
    return {**found, **scaled, "precond": precond, "arch": arch}


def _precond(network: Kwargs, loss: Kwargs) -> str:
    """--precond by the classes of network and loss, which must have no settings of their own."""
    names = [str(part.get("class_name")).rpartition(".")[2] for part in (network, loss)]
    found = [precond for precond, classes in PRECONDS.items() if list(classes) == names]
    if not found or set(loss) != {"class_name"}:
        raise ValueError(f"no --precond has {names[0]} with {names[1]} and the settings of its loss_kwargs")
    return found[0]


def _check_same(where: str, have: Kwargs, usual: Kwargs) -> None:
    wrong = [name for name in {**usual, **have} if have.get(name) != usual.get(name)]
    if wrong:
        raise ValueError(f"no option sets {where}: {', '.join(wrong)} as it does")


def _object(content: Kwargs, key: str) -> Kwargs:
    value = content.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"its '{key}' is no JSON object")
    return value


def _scaled(content: Kwargs, key: str, scale: int) -> float | None:
    """A number in the unit of its option."""
    value = content.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError(f"its '{key}' is no number")
    return None if value is None else value / scale
