"""The values of `train.py`'s options: what they are, which belong together, how a file gives them. Imports no torch."""

from __future__ import annotations

import difflib
import importlib.util
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import click

from dnnlib import cli
from dnnlib.errors import UsageError, UserError, public_url
from training.config import ARCHITECTURES, PRECONDS, Kwargs, check_batch, differences, plain
from training.steps import check_steps

WANDB_PROJECT = "edm-distill"
LADDER_ALONE = frozenset(("until", "eval_num", "eval_sets", "eval_batch", "curve", "ref", "detector", "stop_if_worse"))
COMMAND_LINE = "command_line"  # the key of training_options.json under which the options lie that were given
# Options that train.py and distill.py have alike.
batch_gpu_option = click.option(
    "--batch-gpu", help="Limit batch size per process; auto: what fits", metavar="INT|auto", type=cli.WholeOrAuto()
)
teacher_precision_option = click.option(
    "--teacher-precision",
    help="Arithmetic of the teacher; fp32 is TF32 on GPUs where --precision is another",
    type=cli.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
)
recompute_option = click.option(
    "--recompute",
    help="Recompute activations: less memory, one more network call an image",
    metavar="BOOL",
    type=cli.Bool(),
    default=False,
)


def option(default: Any, *alters: str) -> Any:
    """A field of Options. alters: what the option decides of `TrainConfig.identity`; none: it alters no result."""
    return field(default=default, metadata={"alters": alters})


@dataclass
class Options:
    """The values of `train.py`'s options; None where the default depends on other options.

    The one place that lists which options alter the result: resuming (`named_differences`) and a ladder's recipe follow
    it.
    """

    outdir: str = option(MISSING)
    data: str = option(MISSING, "data.0")
    precond: str = option("edm", "network", "loss")
    cond: bool | None = option(None, "data.1")
    arch: str | None = option(None, "network")
    cbase: int | None = option(None, "network.model_channels")
    cres: list[int] | None = option(None, "network.channel_mult")  # noqa: RUF009  # it makes a field
    blocks: int | None = option(None, "network.num_blocks")
    sigma_data: float | None = option(None, "network.sigma_data", "loss.sigma_data")
    p_mean: float | None = option(None, "loss.P_mean")
    p_std: float | None = option(None, "loss.P_std")
    num_steps: int | None = option(None, "loss.num_steps", "distillation.num_steps")
    ratio: int = option(2, "loss.ratio", "distillation.ratio")
    teacher_solver: str | None = option(None, "loss.teacher_solver", "distillation.teacher_solver")
    weighting: str = option("geomean", "loss.weighting")
    intervals: str | None = option(None, "loss.intervals")  # loss
    self_teacher: bool = option(False, "distillation.self_teacher")
    duration: float | None = option(None, "duration")  # Mimg
    batch: int = option(512, "batch")
    batch_gpu: int | str | None = option(None)  # or AUTO
    lr: float | None = option(None, "lr.0")
    lr_decay: str | None = option(None, "lr-decay")
    warmup: float | None = option(None, "warmup")  # Mimg
    ema: float = option(0.5, "ema.0")  # Mimg
    ema_std: float | None = option(None, "ema.std")
    clip: float | None = option(None, "clip")
    dropout: float | None = option(None, "network.dropout")
    augment: float | None = option(None, "augment.p")
    xflip: bool = option(False, "data.2")
    precision: str | None = option(None, "precision")
    teacher_precision: str = option("fp32", "teacher-precision")
    recompute: bool = option(False)
    fp16: bool = option(False, "precision")
    compile: bool = option(False)
    ls: float = option(1.0, "ls")
    bench: bool = option(True)
    cache: bool = option(True)
    workers: int = option(1)
    deterministic: bool = option(False)
    desc: str | None = option(None)
    nosubdir: bool = option(False)
    tick: float = option(50)  # kimg
    snap: int | None = option(50)
    dump: int | None = option(500)
    targets: int | None = option(None)
    save_every: float = option(10)  # minutes
    seed: int | None = option(None, "seed")
    transfer: str | None = option(None, "transfer")
    resume: str | None = option(None)
    tensorboard: bool = option(False)
    wandb: str | None = option(None)  # project
    trust_network_code: bool = option(False)

    @property
    def distils(self) -> bool:
        return self.precond == "edm_distillation"


ALTERING = tuple(each.name for each in fields(Options) if each.metadata["alters"])
DISTILLATION = (
    *("num_steps", "ratio", "teacher_solver", "weighting", "intervals", "self_teacher", "teacher_precision", "targets"),
)
FILES = ("--data", "--transfer")  # compared by their content


def flag(name: str) -> str:
    """How an option is typed."""
    return "--" + (name if name == "num_steps" else name.replace("_", "-"))


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
        for name in _changed(options, "p_mean", "p_std", "sigma_data"):
            raise UsageError(f"{name} has no meaning in distillation, whose noise levels are the teacher's")
        return
    others = {
        "edm_distillation": DISTILLATION,
        "edm": () if options.precond == "edm" else ("p_mean", "p_std", "sigma_data"),
    }
    for precond, names in others.items():
        if wrong := _changed(options, *names):
            verb = "belongs" if len(wrong) == 1 else "belong"
            raise UsageError(
                f"{', '.join(wrong[:-1])}{' and ' * (len(wrong) > 1)}{wrong[-1]} {verb} to --precond={precond}"
            )


def _changed(options: Options, *names: str) -> list[str]:
    """Those options, as they are typed, that have another value than their default."""
    return [flag(name) for name in names if getattr(options, name) != getattr(Options, name)]


def given(options: Options) -> Kwargs:
    """The options that differ from their defaults, as a file tells them. Not `resume`: that is about one start."""
    values = {each.name: getattr(options, each.name) for each in fields(Options) if each.name != "resume"}
    defaults = {each.name: each.default for each in fields(Options) if each.default is not MISSING}
    told = {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}
    return {name: public_url(value) if isinstance(value, str) else value for name, value in told.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Identities of runs (config.TrainConfig.identity) in terms of options

_WITHOUT_OPTION = {
    **{"data.3": "resolution", "data.4": "number of images"},
    **{"lr.1": "betas", "lr.2": "eps", "ema.1": "EMA ramp-up ratio"},
}


def named_differences(saved: Kwargs, identity: Kwargs) -> list[str]:
    """The options that alter the result and differ between two identities, with both values; what has no option is
    named as `training_options.json` has it."""
    old, new = without_defaults(saved), without_defaults(identity)
    exact = differences(old, new)
    return told_as_options(old, new) or exact if exact else []


def by_content(options: Kwargs) -> Kwargs:
    """Values by the names of options, with those named that are compared by what a file holds."""
    return {f"the content of {name}" if name in FILES else name: value for name, value in options.items()}


def as_options(identity: Kwargs) -> Kwargs:
    """An identity as people know it: by the options of `train.py`, in their units, and what has no option by name."""
    parts: Kwargs = {}
    for name, value in plain(identity).items():
        if name == "ema" and value[:1] == ["std"]:
            parts["ema.std"] = value[1]
        elif isinstance(value, list):
            parts |= {f"{name}.{index}": part for index, part in enumerate(value)}
        elif isinstance(value, dict):
            parts |= {f"{name}.{key}": part for key, part in value.items()}
        elif name == "augment":
            parts["augment.p"] = 0.0
        else:
            parts[name] = value
    names = {part: flag(each.name) for each in reversed(fields(Options)) for part in each.metadata["alters"]}
    told = by_content({names.get(part, _WITHOUT_OPTION.get(part, part)): value for part, value in parts.items()})
    if isinstance(told.get("--cres"), list):
        told["--cres"] = ",".join(map(str, told["--cres"]))
    told["--teacher-precision"] = told.get("--teacher-precision") or "fp32"
    for name, images in (("--duration", 1_000_000), ("--warmup", 1000), ("--ema", 1000)):
        if isinstance(told.get(name), (int, float)):
            told[name] /= images  # Mimg
    return told


def without_defaults(identity: Kwargs) -> Kwargs:
    """An identity without what EDM's loss and preconditioning would have without being told."""
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
        if before.get(cause) != now.get(cause) and (follows != "--duration" or None in (before[follows], now[follows])):
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
        if not LADDER_ALONE.isdisjoint(values):
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
    own = ("class_name", "dropout", "use_fp16", "augment_dim", "model_channels", "channel_mult")
    usual = {name: value for name, value in ARCHITECTURES[arch].items() if name not in own}
    _check_same("network_kwargs", {name: value for name, value in network.items() if name not in own}, usual)
    adam = {"class_name": "torch.optim.Adam", "betas": [0.9, 0.999], "eps": 1e-8}
    _check_same("optimizer_kwargs", {name: value for name, value in optimizer.items() if name != "lr"}, adam)
    augment = _object(content, "augment_kwargs") if content.get("augment_kwargs") else {"p": 0}
    return {
        "data": data.get("path"),
        "cond": data.get("use_labels"),
        "xflip": data.get("xflip"),
        "cache": data.get("cache"),
        "workers": _object(content, "data_loader_kwargs").get("num_workers"),
        "precond": precond,
        "arch": arch,
        "cbase": network.get("model_channels"),
        "cres": network.get("channel_mult"),
        "dropout": network.get("dropout"),
        "fp16": network.get("use_fp16"),
        "augment": augment.get("p"),
        "lr": optimizer.get("lr"),
        "duration": _thousandth(content, "total_kimg"),
        "ema": _thousandth(content, "ema_halflife_kimg"),
        "batch": content.get("batch_size"),
        "batch_gpu": content.get("batch_gpu"),
        "ls": content.get("loss_scaling"),
        "bench": content.get("cudnn_benchmark"),
        "tick": content.get("kimg_per_tick"),
        "snap": content.get("snapshot_ticks"),
        "dump": content.get("state_dump_ticks"),
        "seed": content.get("seed"),
        "transfer": content.get("resume_pkl"),
    }


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


def _thousandth(content: Kwargs, key: str) -> float | None:
    """Millions of images from thousands."""
    value = content.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError(f"its '{key}' is no number")
    return None if value is None else value / 1000
