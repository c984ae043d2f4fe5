"""What a run stood on: programs, machine and the commit of this working copy, for those who read its files later."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import distributed as dist

ROOT = Path(__file__).resolve().parent.parent


def describe_environment() -> dict[str, Any]:
    """Plain strings and numbers, for JSON. None of it alters a result that is to be gone on with."""
    device = dist.device()
    gpu = device.type == "cuda"
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU, {os.cpu_count()} cores",
        "cuda": torch.version.cuda if gpu else None,
        "processes": dist.get_world_size(),
        "threads": torch.get_num_threads(),
    }


def git_revision() -> str | None:
    """The commit of this working copy, with '+' where its files differ from it; None where git doesn't know."""
    if not (ROOT / ".git").exists():  # git would answer for a repository further up
        return None
    commit = _git("rev-parse", "--short=12", "HEAD")
    return f"{commit}+" if commit and _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*words: str) -> str | None:
    command = ["git", "-C", str(ROOT), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
