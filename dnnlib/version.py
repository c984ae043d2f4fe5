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
    revision = _git("rev-parse", "--short=12", "HEAD")
    if not revision:
        return None
    return revision + "+" if _git("status", "--porcelain", "--untracked-files=no") else revision


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


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
