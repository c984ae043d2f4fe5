"""What runs here: the version of this program and of what it stands on. Imports torch only when asked."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

VERSION = "0.1.0"
ROOT = Path(__file__).resolve().parent.parent


def git_revision() -> str | None:
    """The commit of this working copy, with '+' where files differ from it; None without git."""
    if not (ROOT / ".git").exists():
        return None  # git would answer for a repository further up
    words = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe() -> list[str]:
    """Lines for `--version`."""
    revision = git_revision()
    lines = [
        f"edm-distill {VERSION}" + (f" (git {revision})" if revision else ""),
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}",
    ]
    try:
        import torch
    except ImportError as exc:
        return [*lines, f"torch can't be imported: {' '.join(str(exc).split())}"]
    lines.append(f"torch {torch.__version__}")
    if not torch.cuda.is_available():
        return [*lines, f"CUDA {torch.version.cuda or 'not in this build'}, no GPU"]
    lines.append(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return lines + [f"GPU {index}: {name}" for index, name in enumerate(names)]
