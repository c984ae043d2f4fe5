"""What a run is made of. `Options` is the one table of options: from its entries follow the command lines of `train.py`
and `distill.py`, the keys of `training_options.json`, the identity that resuming compares, what a ladder compares, and
the settings in a report. `TrainConfig` is a run's options with every default filled in, and what follows from them.

To add an option, write an entry and use `config.NAME` where it acts. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache, partial
from typing import Any, Self, TypeVar

import click

from dnnlib import cli

from .config import ARCHITECTURES, INTERVALS, PRECONDS, Kwargs
from .weighting import WEIGHTINGS

STAGE_MIMG = 20.0  # default length of a distillation, in millions of images
WANDB_PROJECT = "edm-distill"
DISTILLATION = "edm_distillation"

Function = TypeVar("Function", bound=Callable[..., Any])
Switch, Word = cli.Bool, cli.Choice
POSITIVE, NOT_NEGATIVE, PROBABILITY = cli.Number(min=0, min_open=True), cli.Number(min=0), cli.Number(0, 1)


@dataclass(frozen=True)
class Entry:
    """One option: its text in the help, what it alters, and where files have it."""

    name: str
    default: Any  # None where `varies`
    varies: tuple[str, str] | None  # defaults in training from scratch and in distillation, as they are typed
    help: str | tuple[str, str]  # of train.py, and of distill.py where that is another
    type: click.ParamType | None = None  # None: text, or a flag where the default is False
    metavar: str | None = None  # None: by type
    section: str = ""  # of the help
    # Whether the result depends on it, so that a resumed run must have the same: True, False, or keys of
    # `TrainConfig.identity`, such as "data.0" (first of a list), "network loss" (both).
    alters: bool | str = True
    key: str | None = None  # of training_options.json; None: the option's name
    within: str = ""  # the key of the dictionary that holds it, such as loss_kwargs
    scale: int = 1  # what the file's value is divided by: 1000 where the file has kimg and the option Mimg
    title: str | None = None  # in a report; None: the name of what alters the result, "": not there
    only: str | None = None  # the --precond that it belongs to
    distill: Kwargs | None = field(default_factory=dict)  # arguments for distill.py; None: it has no such option
    click: Kwargs = field(default_factory=dict)  # further arguments of click.option

    @property
    def flag(self) -> str:
        return flag(self.name)

    @property
    def is_flag(self) -> bool:
        return self.type is None and self.default is False

    @property
    def place(self) -> str:
        """The key of training_options.json, with a dot for one within another, empty where there is none."""
        own = self.name if self.key is None else self.key
        return f"{self.within}.{own}" if self.within else own

    @property
    def heading(self) -> str:
        """What a report calls it, empty where it is not there."""
        return (self.name.replace("_", " ") if self.parts else "") if self.title is None else self.title

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of `TrainConfig.identity` that it decides."""
        outer, _, inner = self.place.rpartition(".")
        if isinstance(self.alters, str):
            return tuple(self.alters.split())
        if outer == "distillation":  # which the loss has too
            return (f"loss.{inner}", self.place)
        own = self.place.replace("_kwargs", "") if outer else self.name.replace("_", "-")
        return (own,) if self.alters else ()

    def usual(self, distils: bool) -> Any:
        """The default in distillation or in training from scratch."""
        if self.varies is None or self.type is None:
            return self.default
        return self.type.convert(self.varies[int(distils)], None, None)

    def add_to(self, function: Function, script: str) -> Function:
        """Decorates a click command's function with the option, as `script` has it."""
        distill = script == "distill"
        text = self.help if isinstance(self.help, str) else self.help[distill]
        attrs: Kwargs = {"metavar": self.metavar or METAVARS.get(type(self.type)), "type": self.type}
        if self.varies is None:
            attrs |= {"required": True} if self.default is MISSING else {"default": self.default}
            attrs["is_flag"] = self.is_flag or None
        elif distill:
            attrs["default"] = self.varies[1]
        else:
            scratch, distilled = self.varies
            text += f": default {scratch}{'' if scratch == distilled else f', distillation {distilled}'}"
        attrs |= self.click | ((self.distill or {}) if distill else {})
        given = {name: value for name, value in attrs.items() if value is not None}
        return click.option(self.flag, help=text, **given)(function)


METAVARS: dict[Any, str] = {cli.Bool: "BOOL", cli.Whole: "INT", cli.Number: "FLOAT", cli.IntList: "LIST"}


def option(
    default: Any, help: Any, type: click.ParamType | None = None, metavar: str | None = None, **more: Any
) -> Any:
    """A field of a table of options, for which `Entry` has the arguments. default: MISSING for what must be given, a
    pair where training from scratch and distillation have one each, as they are typed."""
    varies = default if isinstance(default, tuple) else None
    entry = partial(Entry, varies=varies, help=help, type=type, metavar=metavar, **more)
    return field(default=None if varies else default, metadata={"entry": entry})


def flag(name: str) -> str:
    """How an option is typed."""
    return "--" + (name if name == "num_steps" else name.replace("_", "-"))


main, measuring = partial(option, section="Main"), partial(option, section="Measuring")
method = partial(option, section="Distillation", only=DISTILLATION)
stage, loss = partial(method, within="distillation"), partial(method, within="loss_kwargs")
hyper = partial(option, section="Hyperparameters")
size = partial(hyper, within="network_kwargs", distill=None)
mimg = partial(hyper, metavar="MIMG", scale=1000)
edm = partial(hyper, within="loss_kwargs", only="edm", distill=None, title="")
speed = partial(option, section="Performance", alters=False)
output = partial(option, section="Output and resuming", alters=False)
start = partial(output, distill=None, key="")


@dataclass
class Options:
    """The options of `train.py` and of a stage of `distill.py`. What has two defaults is None until `filled`."""

    outdir: str = main(
        MISSING,
        ("Where to save the results", "Where to save the results; the same command resumes there"),
        metavar="DIR",
        alters=False,
        key="",
    )
    data: str = main(MISSING, "Path to the dataset", metavar="ZIP|DIR", alters="data.0", key="dataset_kwargs.path")
    cond: bool | None = main(
        None,
        "Class-conditional: default 0, or as the teacher",
        Switch(),
        alters="data.1",
        key="dataset_kwargs.use_labels",
        title="labels",
    )
    arch: str | None = main(
        None,
        "Network architecture: default ddpmpp, or the teacher's",
        Word(list(ARCHITECTURES)),
        alters="network",
        key="",
        distill=None,
    )
    precond: str = main(
        "edm",
        "Preconditioning and loss; edm_distillation runs one stage of progressive distillation",
        Word([*PRECONDS, DISTILLATION]),
        alters="network loss",
        key="",
        distill=None,
    )
    transfer: str | None = main(
        None,
        ("Teacher, or weights to start from", "The teacher"),
        metavar="PATH|URL",
        alters="transfer",
        key="resume_pkl",
        title="teacher",
        distill={"required": True},
    )
    num_steps: int | None = stage(
        None, "Teacher's sampling steps; the student gets N / ratio", cli.Whole(), "N", title="teacher's steps"
    )
    ratio: int = stage(2, "Teacher steps per student step", cli.Whole(min=2))
    grid: str = method(
        "edm",
        "Noise levels of an undistilled teacher: EDM's, measured where its path is curved, or a list such as 80,5,1,0",
        metavar="edm|measured|LEVELS|FILE",
        alters="distillation.teacher_levels",
        key="",
        title="noise grid",
    )
    teacher_solver: str | None = stage(
        None,
        "How the (first) teacher steps: default heun for an undistilled teacher, euler for a student",
        Word(["heun", "euler"]),
        title="teacher's solver",
    )
    weighting: str = loss(
        "geomean", "Weight of noise levels in the loss; the default worked best", Word(list(WEIGHTINGS))
    )
    intervals: str = loss(
        "loss", "Train all jumps equally often, or by their loss, which worked better", Word(INTERVALS)
    )
    self_teacher: bool = stage(
        False,
        "Learn from one teacher step, then a jump of the student's own EMA (TRACT, consistency)",
        title="self-teacher",
    )
    targets: int | None = method(
        None, "How often to save targets-KKKKKK.png", cli.Whole(min=1), "TICKS", alters=False, key="targets_ticks"
    )
    duration: float = mimg(
        ("200", f"{STAGE_MIMG:g}"),
        "Training duration",
        cli.Number(0, 1_000_000, min_open=True),
        alters="duration",
        key="total_kimg",
        title="length, kimg",
    )
    batch: int = hyper(512, "Total batch size", cli.Whole(1, 1_000_000), key="batch_size")
    batch_gpu: int | str | None = hyper(
        None,
        "Limit batch size per process; auto: what fits",
        cli.Whole(min=1, also="auto"),
        "INT|auto",
        alters=False,
        title="batch of a process and round",
    )
    cbase: int | None = size(
        None, "Channel multiplier  [default: varies]", cli.Whole(1, 65536), key="model_channels", title="channels"
    )
    cres: list[int] | None = size(  # noqa: RUF009  # it makes a field
        None, "Channels per resolution  [default: varies]", cli.IntList(1, 1024), key="channel_mult", title=""
    )
    blocks: int | None = size(
        None,
        "Residual blocks per resolution  [default: varies]",
        cli.Whole(1, 64),
        key="num_blocks",
        title="residual blocks",
    )
    lr: float = hyper(
        ("10e-4", "5e-4"), "Learning rate", POSITIVE, alters="lr.0", key="optimizer_kwargs.lr", title="learning rate"
    )
    lr_decay: str = hyper(
        ("none", "linear"), "Decay to 0 at the end", Word(["none", "linear", "cosine"]), title="learning-rate decay"
    )
    warmup: float = mimg(("10", "0"), "Learning-rate ramp", NOT_NEGATIVE, key="lr_rampup_kimg", title="warm-up, kimg")
    ema: float = mimg(
        0.5,
        "EMA half-life; at most 5% of the images seen while a run is young",
        NOT_NEGATIVE,
        alters="ema.0",
        key="ema_halflife_kimg",
        title="EMA half-life, kimg",
    )
    ema_std: float | None = hyper(
        None,
        "Power-function EMA of this relative width (EDM2's sigma_rel) instead of --ema",
        cli.Number(0, 0.28, min_open=True),
        alters="ema.std",
        title="EMA std",
    )
    clip: float | None = hyper(None, "Largest gradient norm  [default: none]", POSITIVE, title="gradient clip")
    dropout: float = hyper(("0.13", "0"), "Dropout probability", PROBABILITY, key="network_kwargs.dropout")
    augment: float = hyper(
        ("0.12", "0"), "Augment probability", PROBABILITY, key="augment_kwargs.p", title="augmentation"
    )
    xflip: bool = hyper(
        False, "Enable dataset x-flips", Switch(), alters="data.2", key="dataset_kwargs.xflip", title="mirror images"
    )
    seed: int | None = hyper(
        None, ("Random seed  [default: random]", "Random seed"), cli.Whole(min=0), distill={"default": 0}
    )
    sigma_data: float | None = edm(
        None, "Data deviation (edm)  [default: 0.5]", POSITIVE, alters="network.sigma_data loss.sigma_data"
    )
    p_mean: float | None = edm(None, "Mean of ln(sigma) (edm)  [default: -1.2]", cli.Number(-20, 20), key="P_mean")
    p_std: float | None = edm(None, "Deviation of ln(sigma) (edm)  [default: 1.2]", POSITIVE, key="P_std")
    precision: str = speed(
        ("fp32", "fp32"), "Arithmetic of the trained network", Word(["fp32", "tf32", "bf16", "fp16"]), alters=True
    )
    fp16: bool = speed(
        False,
        "Same as --precision=fp16",
        Switch(),
        alters="precision",
        key="network_kwargs.use_fp16",
        title="",
        distill=None,
    )
    teacher_precision: str = speed(
        "fp32",
        "Arithmetic of the teacher; fp32 is TF32 on GPUs where --precision is another",
        Word(["fp32", "bf16", "fp16"]),
        alters=True,
        title="teacher's precision",
        only=DISTILLATION,
    )
    recompute: bool = speed(
        False, "Recompute activations: less memory, one more network call an image", Switch(), title="activations"
    )
    compile: bool = speed(False, "torch.compile the networks", Switch())
    ls: float = speed(
        1.0, "Loss scaling", POSITIVE, alters=True, key="loss_scaling", title="", distill=None, click={"default": 1}
    )
    bench: bool = speed(True, "Enable cuDNN benchmarking", Switch(), key="cudnn_benchmark")
    cache: bool = speed(True, "Cache dataset in CPU memory", Switch(), key="dataset_kwargs.cache")
    workers: int = speed(1, "Threads that read images", cli.Whole(1, 256), key="data_loader_kwargs.num_workers")
    deterministic: bool = speed(False, "CUDA: deterministic kernels, for exact resuming")
    desc: str | None = start(None, "String to include in result dir name", metavar="STR")
    nosubdir: bool = start(False, "Use --outdir itself; the same command resumes the run")
    tick: float = output(50, "How often to print progress", POSITIVE, "KIMG", key="kimg_per_tick")
    snap: int | None = output(50, "How often to save snapshots", cli.Whole(min=1), "TICKS", key="snapshot_ticks")
    dump: int | None = output(
        500, "How often to dump state (the last 10 are kept)", cli.Whole(min=1), "TICKS", key="state_dump_ticks"
    )
    save_every: float = output(
        10, "Rolling training state (the last 2 are kept)", cli.Number(min=0), "MIN", key="save_every_min"
    )
    resume: str | None = start(None, "Resume from a training state", metavar="PT|latest")
    tensorboard: bool = output(False, "Also write TensorBoard events")
    wandb: str | None = output(
        None,
        "Also log to Weights & Biases, --wandb=PROJECT or just --wandb",
        metavar="[PROJECT]",
        click={"is_flag": False, "flag_value": WANDB_PROJECT},
    )
    trust_network_code: bool = output(False, "Run the code in a --transfer file of unknown class or version")

    @property
    def distils(self) -> bool:
        return self.precond == DISTILLATION

    def filled(self) -> Self:
        """The same options with defaults in place of None, those of distillation or of training from scratch."""
        unset = [each for each in entries(Options) if each.varies and getattr(self, each.name) is None]
        values = {each.name: each.usual(self.distils) for each in unset}
        return replace(self, **values | ({"precision": "fp16"} if self.fp16 else {}))

    def within(self, key: str) -> Kwargs:
        """The options that belong to a key of training_options.json, by their names within it, without those that are
        None or of another --precond."""
        found = {
            each.place.partition(".")[2]: getattr(self, each.name)
            for each in entries(Options)
            if each.place.startswith(f"{key}.") and (self.distils or each.only != DISTILLATION)
        }
        return {name: value for name, value in found.items() if value is not None}

    def fresh_kwargs(self) -> tuple[Kwargs, Kwargs]:
        """Settings of network and loss for training from scratch. The options must be `filled`."""
        precond, loss = PRECONDS[self.precond]
        network = {**ARCHITECTURES[self.arch or "ddpmpp"], "class_name": f"training.networks.{precond}"}
        network |= self.within("network_kwargs") | {"use_fp16": self.precision == "fp16"}
        network |= {"augment_dim": 9} if self.augment else {}
        network |= {} if self.sigma_data is None else {"sigma_data": self.sigma_data}
        return network, {"class_name": f"training.loss.{loss}", **self.within("loss_kwargs")}


@dataclass(kw_only=True)
class LadderOptions:
    """The options of `distill.py` that are not a stage's own, and those of a stage that it takes as lists."""

    num_steps: int | None = main(None, "The teacher's sampling steps", cli.Whole(1, 100_000), "N")
    until: int = main(1, "Steps of the last student", cli.Whole(min=1), "N")
    ratio: list[int] = main(  # noqa: RUF009
        ("2", "2"), "Teacher steps per student step, for all stages or each", cli.IntList(2, 100_000)
    )
    duration: list[float] = main(  # noqa: RUF009  # Mimg
        (f"{STAGE_MIMG:g}", f"{STAGE_MIMG:g}"),
        "Length of a stage, for all or each: the first works best at twice the others or more",
        cli.FloatList(),
        "MIMG,...",
    )
    lr: list[float] = hyper(  # noqa: RUF009
        ("5e-4", "5e-4"), "Learning rate, for all stages or each", cli.FloatList(), "FLOAT,..."
    )
    stop_if_worse: float | None = method(
        None,
        "End where a student's endpoint_rmse is so many times that of the one before, such as 1.5",
        POSITIVE,
        "FACTOR",
    )
    ref: str | None = measuring(None, "Reference statistics  [default: computed from --data]", metavar="NPZ|URL")
    detector: str = measuring(
        "inception", "Features for the Fréchet distance; none: endpoint_rmse alone", metavar="inception|none|FILE"
    )
    eval_num: int = measuring(
        50000, "Images that measure a rung (endpoint_rmse: the first 2048)", cli.Whole(2, cli.MAX_RANGE)
    )
    eval_sets: int = measuring(3, "Seed sets of --eval-num images per rung; fd is their mean ± std", cli.Whole(min=1))
    eval_batch: int = measuring(64, "Batch size when measuring", cli.Whole(min=1))
    curve: bool = measuring(True, "Also measure an undistilled teacher itself at the students' costs", Switch())
    command_line: Kwargs | None = None  # what was typed, for ladder-options.json


@cache
def entries(table: type) -> tuple[Entry, ...]:
    """The options of a table, in its order."""
    found = [each for each in fields(table) if "entry" in each.metadata]
    return tuple(each.metadata["entry"](name=each.name, default=each.default) for each in found)


def options_of(script: str, section: str) -> Callable[[Function], Function]:
    """Decorator of the function of a click command: the options that `script` has in a section of its help."""
    table = {each.name: each for each in entries(Options) if script == "train" or each.distill is not None}
    if script == "distill":
        table |= {each.name: each for each in entries(LadderOptions)}

    def decorate(function: Function) -> Function:
        for entry in reversed(table.values()):
            if entry.section == section:
                function = entry.add_to(function, script)
        return cli.section(section)(function)

    return decorate


@dataclass(kw_only=True)
class TrainConfig(Options):
    """All that a training run needs: its options, every default filled in, and what follows from data and teacher."""

    run_dir: str
    dataset_kwargs: Kwargs  # path, use_labels, xflip, cache, resolution, max_size
    network_kwargs: Kwargs  # class_name and constructor arguments, without the interface that the data dictates
    loss_kwargs: Kwargs  # class_name and constructor arguments (a distillation's grid comes from the teacher)
    augment_kwargs: Kwargs | None = None
    seed: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    ema_rampup_ratio: float | None = 0.05
    transfer_sha256: str | None = None
    distillation: Kwargs | None = None  # num_steps, ratio, teacher_solver, self_teacher, teacher_levels, lineage
    data_fingerprint: str | None = None
    command_line: Kwargs = field(default_factory=dict)  # the options that were given

    @property
    def total_kimg(self) -> int:
        return max(int(self.duration * 1000), 1)

    @property
    def total_nimg(self) -> int:
        return self.total_kimg * 1000

    @property
    def lr_rampup_kimg(self) -> float:
        return self.warmup * 1000

    @property
    def ema_halflife_kimg(self) -> float:
        kimg = self.ema * 1000
        return int(kimg) if kimg == int(kimg) else kimg  # as EDM's files have it

    def to_options(self) -> Kwargs:
        """The content of `training_options.json`: EDM's keys and this program's own."""
        adam = {"class_name": "torch.optim.Adam", "lr": self.lr, "betas": list(self.betas), "eps": self.eps}
        options: Kwargs = {
            "dataset_kwargs": {"class_name": "training.dataset.ImageFolderDataset", **self.dataset_kwargs},
            "data_loader_kwargs": {"pin_memory": True, "num_workers": self.workers, "prefetch_factor": 2},
            "network_kwargs": self.network_kwargs,
            "loss_kwargs": self.loss_kwargs,
            "optimizer_kwargs": adam,
            "augment_kwargs": self.augment_kwargs
            and {"class_name": "training.augment.AugmentPipe", **self.augment_kwargs},
        }
        options |= {each.place: self._written(each) for each in entries(Options) if each.place.isidentifier()}
        if self.transfer is None:
            del options["resume_pkl"]
        if self.transfer is not None or self.distillation is not None:
            options["ema_rampup_ratio"] = self.ema_rampup_ratio
        own = ("run_dir", "transfer_sha256", "distillation", "data_fingerprint", "command_line")
        return options | {name: getattr(self, name) for name in own}

    def to_file(self, nimg: int) -> Kwargs:
        """How a network came about, for its file: images seen and `identity`, without what the file has elsewhere."""
        elsewhere = ("network", "loss", "augment", "distillation")
        return {"kimg": nimg / 1000} | {name: v for name, v in self.identity().items() if name not in elsewhere}

    def identity(self) -> Kwargs:
        """Everything that alters the result. A run resumes from a state with the same identity only.

        Left out: paths, the partition of a batch (batch_gpu), workers, ticks, and what only saves or shows. The length
        of a run belongs here when the learning rate decays towards its end, and only then.
        """
        data = [self.dataset_kwargs.get(name) for name in ("use_labels", "xflip", "resolution", "max_size")]
        composed = {
            "data": [self.data_fingerprint, *data],
            "network": self.network_kwargs,
            "loss": self.loss_kwargs,
            "augment": self.augment_kwargs,
            "lr": [self.lr, list(self.betas), self.eps],
            "duration": self.total_nimg if self.lr_decay != "none" else None,
            "ema": ["std", self.ema_std] if self.ema_std else [self.ema_halflife_kimg, self.ema_rampup_ratio],
            "teacher-precision": self.teacher_precision if self.teacher_precision != "fp32" else None,
            "transfer": self.transfer_sha256,
            "distillation": self.distillation and {k: v for k, v in self.distillation.items() if k != "lineage"},
        }
        plain = {each.parts[0]: self._written(each) for each in entries(Options) if each.alters is True}
        names = dict.fromkeys(part.partition(".")[0] for each in entries(Options) for part in each.parts)
        return {name: (plain | composed)[name] for name in names}

    def _written(self, entry: Entry) -> Any:
        """The value of an option in the unit of files: that of a property above, or the option's own."""
        return getattr(self, entry.place if hasattr(type(self), entry.place) else entry.name)
