"""What to type after a run: commands that work as they are printed, in the folder in which the run was started."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dnnlib.cli import UserError, bold, green, program
from metrics.classifier import FEWEST_IMAGES
from torch_utils import distributed as dist
from training.dataset import ImageFolderDataset
from training.recipe import DISTILLATION, STAGE_MIMG, Options, entries, flag
from training.steps import ratios_that_work

from .options import given
from .setup import Run

FID_IMAGES = 50000  # fid.py's default
FEW_IMAGES = 2000  # on a CPU
INCEPTION_FITS = 32  # pixels of a side; it was made for photographs
FIRST_STEPS = 32  # proposed for a network that has just been trained from scratch
KEPT = "batch batch_gpu xflip nosubdir seed tick snap dump save_every precision compile workers"  # by a first stage


def describe_end(options: Options, run: Run, snapshot: Path) -> list[str]:
    """Lines for people: what a finished run has left, and the next commands."""
    folder, data, network = snapshot.parent, str(run.config.dataset_kwargs["path"]), f"--network={snapshot}"
    last = sorted(path.name for path in folder.glob(f"*-{snapshot.stem.rpartition('-')[2]}.*"))
    left = [*last, *(name for name in ("stats.jsonl", "log.txt", "training_options.json") if (folder / name).is_file())]
    drawn = [*([f"--labels={data}"] if run.dataset.has_label_vectors else []), *trusting(options)]
    found = [
        ("images", [[*launched("generate.py"), network, f"--outdir={folder / 'images'}", "--seeds=0-63", *drawn]]),
        measure_commands(run, folder, data, network, drawn),
        ("all about this run on one page", [[*launched("report.py", alone=True), str(folder)]]),
        *next_stages(options, run, snapshot),
    ]
    lines = ["", green(f"Written to {folder}: {', '.join(left)}"), bold("Next:")]
    for title, commands in found:
        lines += [f"  {title}", *(f"    {shlex.join(words)}" for words in commands)]
    return lines


def trusting(options: Options) -> list[str]:
    """The option that a network needs elsewhere if it needed it here."""
    return ["--trust-network-code"] if options.trust_network_code else []


def measure_commands(
    run: Run, folder: Path, data: str, network: str, drawn: Sequence[str] = ()
) -> tuple[str, list[list[str]]]:
    """(what for, commands) of measuring a network: by Inception, or where its features don't fit the images and there
    are classes to learn others from, by a detector of the data's own."""
    ref, own = folder / "ref.npz", suitable_detector(run.dataset, data, folder)
    title = "FID: the data's statistics, then the network's distance"
    commands = [
        [*launched("fid.py"), "ref", f"--data={data}", f"--dest={ref}"],
        [*launched("fid.py"), "gen", network, f"--ref={ref}", *drawn, *fewer_images("--num-images")],
    ]
    if commands[1][-1].startswith("--num-images"):
        title += f" (over {FEW_IMAGES} images; {FID_IMAGES} is customary)"
    if own == "none":
        title += "; Inception was made for photographs, and says little of such images"
    elif own != "inception":
        title = title.replace("FID: ", "Fréchet distance (Inception does not fit such images): a detector, ")
        detector = [*launched("fid.py", alone=True), "detector", f"--data={data}", f"--dest={own}"]
        commands = [detector, *([*words, f"--detector={own}"] for words in commands)]
    return title, commands


def suitable_detector(dataset: ImageFolderDataset, data: str, folder: Path) -> str:
    """A --detector for a data set: Inception, else a file to be made of its classes, where it has enough, or none."""
    if inception_fits(dataset):
        return "inception"
    return str(folder / "detector.pt") if has_classes(data) and len(dataset) >= FEWEST_IMAGES else "none"


def inception_fits(dataset: ImageFolderDataset) -> bool:
    """Whether the images are like photographs."""
    return dataset.num_channels == 3 and dataset.resolution >= INCEPTION_FITS


def fewer_images(option: str) -> list[str]:
    """The option for the number of images to measure, where a CPU has no time for the customary one."""
    return [f"{option}={FEW_IMAGES}"] if dist.device().type == "cpu" else []


def has_classes(data: str) -> bool:
    """Whether a data set has classes, used by the run or not."""
    with contextlib.closing(ImageFolderDataset(data, use_labels=True)) as dataset:
        try:
            return dataset.has_onehot_labels and dataset.label_dim > 1
        except UserError:  # labels that this run had no use for, nor would a detector
            return False


def next_stages(options: Options, run: Run, snapshot: Path) -> list[tuple[str, list[list[str]]]]:
    """(what for, commands) of the stage whose teacher this run's network is; after training from scratch, of the whole
    ladder first. Empty after a last stage."""
    kept = {name: getattr(options, name) for name in KEPT.split()}
    if options.duration is not None and options.duration < STAGE_MIMG:  # of a small network, or a trial
        kept["duration"] = options.duration
    stage, steps = Options(options.outdir, options.data, precond=DISTILLATION, **kept), FIRST_STEPS
    if run.stage is not None:
        steps = run.stage.sampling.grid.steps
        ratios = ratios_that_work(steps)
        if not ratios:
            return []
        ratio = options.ratio if options.ratio in ratios else ratios[0]
        stage = replace(options, ratio=ratio, teacher_solver=None, grid="edm", resume=None)
    title, folder = f"{steps} -> {steps // stage.ratio} steps", Path(options.outdir)
    stage = replace(stage, transfer=str(snapshot), num_steps=steps)
    if options.nosubdir:  # that folder is this run's own
        outdir = folder.with_name(f"{folder.name}-{steps}to{steps // stage.ratio}")
        stage = replace(stage, outdir=str(outdir))
    found = [(title, [typed("train.py", stage)])]
    if run.stage is None:
        outdir = folder.with_name(f"{folder.name}-ladder")
        ladder = replace(stage, precond=Options.precond, nosubdir=False, outdir=str(outdir))
        detector = suitable_detector(run.dataset, stage.data, snapshot.parent)
        more = [f"--detector={detector}"] * (detector != "inception") + fewer_images("--eval-num")
        found.insert(0, (f"all stages, {steps} -> 1 steps, each measured", [typed("distill.py", ladder, *more)]))
    return found


def train_command(options: Options, device: str) -> str:
    """The train.py command that runs a stage by itself, on a kind of device."""
    return shlex.join(typed("train.py", options, f"--device={device}"))


def typed(script: str, options: Options, *more: str) -> list[str]:
    """The command that starts a script with these options, without what has train.py's own default."""
    words, flags = launched(script), {each.name for each in entries(Options) if each.is_flag}
    for name, value in given(options).items():
        if isinstance(value, list):
            value = ",".join(map(str, value))
        elif isinstance(value, bool):
            value = int(value)
        words.append(flag(name) if name in flags else f"{flag(name)}={value}")
    return [*words, *more]


def launched(script: str, alone: bool = False) -> list[str]:
    """The words that start one of our scripts, from the present folder, on as many processes as there are now, or
    `alone` on one."""
    path = Path(__file__).parent.parent / script
    name = script if path.parent == Path.cwd() else str(path)
    world = 1 if alone else dist.get_world_size()
    if world == 1:
        return [program("python"), name]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes = ["--standalone"] if local == world else [f"--nnodes={world // local}"]
    return [program("torchrun"), *nodes, f"--nproc_per_node={local}", name]
