"""What a run stood on: programs, machine and the commit of this working copy, for those who read its files later."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import public_url
from dnnlib.version import git_revision

from . import distributed as dist


def describe_environment() -> dict[str, Any]:
    """Plain strings and numbers, for JSON. None of it alters a result that is to be gone on with."""
    device = dist.device()
    gpu = device.type == "cuda"
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *map(public_url, sys.argv[1:])]),
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU, {os.cpu_count()} cores",
        "cuda": torch.version.cuda if gpu else None,
        "processes": dist.get_world_size(),
        "threads": torch.get_num_threads(),
    }
