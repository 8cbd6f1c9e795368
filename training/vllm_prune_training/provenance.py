"""What a record says of how a checkpoint was made."""

from __future__ import annotations

import subprocess


def git_commit() -> str:
    """The checked-out commit, or ``unknown``."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
