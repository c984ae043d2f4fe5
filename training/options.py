"""The values of `train.py`'s options: what they are, which belong together, how a file gives them. Imports no torch."""

from __future__ import annotations

import difflib
import importlib.util
import re
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import click

from dnnlib import cli
from dnnlib.cli import UsageError, UserError

from .config import ARCHITECTURES, PRECONDS, Kwargs, check_batch
from .steps import check_steps

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


@dataclass
class Options:
    """The values of `train.py`'s options; None where the default depends on other options."""

    outdir: str
    data: str
    precond: str = "edm"
    cond: bool | None = None
    arch: str | None = None
    cbase: int | None = None
    cres: list[int] | None = None
    blocks: int | None = None
    sigma_data: float | None = None
    p_mean: float | None = None
    p_std: float | None = None
    num_steps: int | None = None
    ratio: int = 2
    teacher_solver: str | None = None
    weighting: str = "geomean"
    intervals: str | None = None  # loss
    self_teacher: bool = False
    duration: float | None = None  # Mimg
    batch: int = 512
    batch_gpu: int | str | None = None  # or AUTO
    lr: float | None = None
    lr_decay: str | None = None
    warmup: float | None = None  # Mimg
    ema: float = 0.5  # Mimg
    ema_std: float | None = None
    clip: float | None = None
    dropout: float | None = None
    augment: float | None = None
    xflip: bool = False
    precision: str | None = None
    teacher_precision: str = "fp32"
    recompute: bool = False
    fp16: bool = False
    compile: bool = False
    ls: float = 1.0
    bench: bool = True
    cache: bool = True
    workers: int = 1
    deterministic: bool = False
    desc: str | None = None
    nosubdir: bool = False
    tick: float = 50  # kimg
    snap: int | None = 50
    dump: int | None = 500
    targets: int | None = None
    save_every: float = 10  # minutes
    seed: int | None = None
    transfer: str | None = None
    resume: str | None = None
    tensorboard: bool = False
    wandb: str | None = None  # project
    trust_network_code: bool = False

    @property
    def distils(self) -> bool:
        return self.precond == "edm_distillation"


def _no_state(name: str) -> str:
    """What is wrong with a --resume that is no file."""
    if difflib.get_close_matches(name, ["latest"], cutoff=0.7):
        return "there is no such file; did you mean 'latest'?"
    if not Path(name).is_dir():
        return "there is no such training state (training-state-*.pt, or latest)"
    found = [*Path(name).glob("training-state-*.pt"), *Path(name).glob("*/training-state-*.pt")]
    newest = f"the newest training state in it is {max(found, key=lambda path: path.stat().st_mtime)}" if found else ""
    return f"is a folder, a file is needed; {newest or 'there is no training state in it'}"


def check_options(options: Options, world_size: int) -> None:
    """Refuses options that contradict each other or lack something, before anything else is looked at.

    Raises UsageError or UserError with one helpful line.
    """
    check_batch(options.batch, options.batch_gpu, world_size)
    if options.resume not in (None, "latest") and not Path(options.resume).is_file():
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
            raise UsageError("--precond=edm_distillation needs a teacher: --transfer=FILE or URL of a network .pkl")
        check_steps(options.num_steps, options.ratio)
        for name in ("p_mean", "p_std", "sigma_data"):
            if getattr(options, name) is not None:
                raise UsageError(
                    f"--{name.replace('_', '-')} has no meaning in distillation, whose noise levels are the teacher's"
                )
    elif options.num_steps is not None or options.teacher_solver is not None or options.targets is not None:
        raise UsageError("--num_steps, --teacher-solver and --targets belong to --precond=edm_distillation")
    elif options.self_teacher or options.intervals is not None or options.teacher_precision != "fp32":
        raise UsageError("--self-teacher, --intervals and --teacher-precision belong to --precond=edm_distillation")
    elif options.ratio != Options.ratio or options.weighting != Options.weighting:
        raise UsageError("--ratio and --weighting belong to --precond=edm_distillation")
    elif options.precond != "edm" and (options.p_mean is not None or options.p_std is not None or options.sigma_data):
        raise UsageError("--p-mean, --p-std and --sigma-data belong to --precond=edm")


def given(options: Options) -> Kwargs:
    """The options that differ from their defaults, as a file tells them. Not `resume`: that is about one start."""
    values = {each.name: getattr(options, each.name) for each in fields(Options) if each.name != "resume"}
    defaults = {each.name: each.default for each in fields(Options) if each.default is not MISSING}
    return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


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
