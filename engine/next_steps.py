"""What to type after a run: commands that work as they are printed, in the folder in which the run was started."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dnnlib.cli import UserError, bold, green, program
from metrics.classifier import FEWEST_IMAGES
from torch_utils import distributed as dist
from training.dataset import ImageFolderDataset
from training.recipe import STAGE_MIMG, Options, entries, flag
from training.steps import ratios_that_work

from .options import given
from .setup import Run

FID_IMAGES, FEW_IMAGES = 50000, 2000  # fid.py's default; on a CPU
INCEPTION_FITS = 32  # pixels of a side; it was made for photographs
FIRST_STEPS = 32  # proposed for a network that has just been trained from scratch


def describe_end(options: Options, run: Run, snapshot: Path) -> list[str]:
    """Lines for people: what a finished run has left, and the next commands."""
    config = run.config
    folder = Path(config.run_dir)
    kimg = snapshot.stem.rpartition("-")[2]
    names: tuple[str, ...] = (f"samples-{kimg}.png", f"targets-{kimg}.png", f"training-state-{kimg}.pt")
    names += (snapshot.name, "stats.jsonl", "log.txt", "training_options.json")
    left = [name for name in names if (folder / name).is_file()]
    lines = ["", green(f"Written to {folder}: {', '.join(left)}"), bold("Next:")]
    for title, commands in next_commands(options, run, snapshot):
        lines += [f"  {title}", *(f"    {command}" for command in commands)]
    return lines


def next_commands(options: Options, run: Run, snapshot: Path) -> list[tuple[str, list[str]]]:
    """(what for, commands): images, the Fréchet distance, and where there are steps to halve, the whole ladder after a
    teacher, and the next stage."""
    folder, data = Path(run.config.run_dir), str(run.config.dataset_kwargs["path"])
    network = f"--network={snapshot}"
    drawn = [*([f"--labels={data}"] if run.dataset.has_label_vectors else []), *trusting(options)]
    images = [*launched("generate.py"), network, f"--outdir={folder / 'images'}", "--seeds=0-63", *drawn]
    commands = [
        ("images", [images]),
        measure_commands(run, folder, data, network, drawn),
        ("all about this run on one page", [[*launched("report.py", alone=True), str(folder)]]),
    ]
    found = [(title, [shlex.join(words) for words in each]) for title, each in commands]
    following = next_stage(options, run, snapshot)
    if following is not None:
        steps, chosen = following
        device = dist.device().type
        here = "cuda" if torch.cuda.is_available() else "cpu"  # --device=auto
        other = None if device == here else device
        if run.stage is None:
            found.append((f"all stages, {steps} -> 1 steps, each measured", [ladder_command(chosen, run, other)]))
        found.append((f"{steps} -> {steps // chosen.ratio} steps", [train_command(chosen, other)]))
    return found


def trusting(options: Options) -> list[str]:
    """The option that a network needs elsewhere if it needed it here."""
    return ["--trust-network-code"] if options.trust_network_code else []


def measure_commands(
    run: Run, folder: Path, data: str, network: str, drawn: Sequence[str] = ()
) -> tuple[str, list[list[str]]]:
    """How to measure the network: by Inception, or where its features don't fit the images and there are classes to
    learn others from, by a detector of the data's own; by as many images as there is time for."""
    ref = folder / "ref.npz"
    gen = [*launched("fid.py"), "gen", network, f"--ref={ref}", *drawn]
    title, gen = by_images("FID: the data's statistics, then the network's distance", gen)
    commands = [[*launched("fid.py"), "ref", f"--data={data}", f"--dest={ref}"], gen]
    own = suitable_detector(run.dataset, data, folder)
    if own == "none":
        title += "; Inception was made for photographs, and says little of such images"
    elif own != "inception":
        title = title.replace("FID: ", "Fréchet distance (Inception does not fit such images): a detector, ")
        commands = [[*words, f"--detector={own}"] for words in commands]
        commands.insert(0, [*launched("fid.py", alone=True), "detector", f"--data={data}", f"--dest={own}"])
    return title, commands


def suitable_detector(dataset: ImageFolderDataset, data: str, folder: Path) -> str:
    """A --detector for a data set: Inception, else a file to be made of its classes, where it has enough, or none."""
    if inception_fits(dataset):
        return "inception"
    return str(folder / "detector.pt") if has_classes(data) and len(dataset) >= FEWEST_IMAGES else "none"


def by_images(title: str, words: list[str]) -> tuple[str, list[str]]:
    """What for, and the command, of a measurement by `images_to_measure`."""
    num = images_to_measure()
    if num == FID_IMAGES:
        return title, words
    return f"{title} (over {num} images; {FID_IMAGES} is customary)", [*words, f"--num-images={num}"]


def inception_fits(dataset: ImageFolderDataset) -> bool:
    """Whether the images are like photographs."""
    return dataset.num_channels == 3 and dataset.resolution >= INCEPTION_FITS


def images_to_measure() -> int:
    """The customary number, or what a CPU has time for."""
    return FEW_IMAGES if dist.device().type == "cpu" else FID_IMAGES


def has_classes(data: str) -> bool:
    """Whether a data set has classes, used by the run or not."""
    dataset = ImageFolderDataset(data, use_labels=True)
    try:
        return dataset.has_onehot_labels and dataset.label_dim > 1
    except UserError:  # labels that this run had no use for, nor would a detector
        return False
    finally:
        dataset.close()


def next_stage(options: Options, run: Run, snapshot: Path) -> tuple[int, Options] | None:
    """(teacher's steps, options) of the stage that makes the run's network a teacher; None after a last one."""
    if run.stage is None:
        steps = FIRST_STEPS
        same = "batch batch_gpu xflip nosubdir seed tick snap dump save_every precision compile workers"
        kept = {name: getattr(options, name) for name in same.split()}
        if options.duration is not None and options.duration < STAGE_MIMG:  # of a small network, or a trial
            kept["duration"] = options.duration
        chosen = Options(options.outdir, options.data, precond="edm_distillation", num_steps=steps, **kept)
    else:
        steps = run.stage.sampling.grid.steps
        ratios = ratios_that_work(steps)
        if not ratios:
            return None
        ratio = options.ratio if options.ratio in ratios else ratios[0]
        chosen = replace(options, ratio=ratio, num_steps=steps, teacher_solver=None, resume=None)
    if options.nosubdir:  # that folder is this run's own
        outdir = Path(options.outdir).with_name(f"{Path(options.outdir).name}-{steps}to{steps // chosen.ratio}")
        chosen = replace(chosen, outdir=str(outdir))
    return steps, replace(chosen, transfer=str(snapshot))


def ladder_command(stage: Options, run: Run, device: str | None = None) -> str:
    """The distill.py command whose first stage is `stage`, with a detector and a number of images that suit the run."""
    run_dir = Path(run.config.run_dir)
    beside = run_dir if stage.nosubdir else Path(stage.outdir)
    outdir = str(beside.with_name(f"{beside.name}-ladder"))
    options = replace(stage, precond=Options.precond, nosubdir=False, outdir=outdir)
    detector, num = suitable_detector(run.dataset, stage.data, run_dir), images_to_measure()
    more = [f"--detector={detector}"] * (detector != "inception") + [f"--eval-num={num}"] * (num != FID_IMAGES)
    return typed("distill.py", options, device, *more)


def train_command(options: Options, device: str | None = None) -> str:
    """The train.py command that runs a stage by itself."""
    return typed("train.py", options, device)


def typed(script: str, options: Options, device: str | None, *more: str) -> str:
    """The command that starts a script with these options, for a shell in the folder in which this program was started.

    What has train.py's own default is left out. device: to be named too.
    """
    words, flags = launched(script), {each.name for each in entries(Options) if each.is_flag}
    for name, value in given(options).items():
        option = flag(name)
        if name in flags:
            words.append(option)
        elif isinstance(value, list):
            words.append(f"{option}={','.join(map(str, value))}")
        else:
            words.append(f"{option}={int(value) if isinstance(value, bool) else value}")
    return shlex.join([*words, *more, *([f"--device={device}"] if device else [])])


def launched(script: str, alone: bool = False) -> list[str]:
    """The words that start one of our scripts, from the present folder, on as many processes as there are now.

    alone: on one process.
    """
    path = Path(__file__).parent.parent / script
    name = script if path.parent == Path.cwd() else str(path)
    world = 1 if alone else dist.get_world_size()
    if world == 1:
        return [program("python"), name]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes = ["--standalone"] if local == world else [f"--nnodes={world // local}"]
    return [program("torchrun"), *nodes, f"--nproc_per_node={local}", name]
