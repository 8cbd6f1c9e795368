"""Every kernel against its naive twin: the files ``kernel_*.py`` beside this one, each in a process of its own.

Without a GPU kernels run under Triton's interpreter, which must be chosen before anything imports Triton, and other tests import
vLLM and torch's compiler.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("kernel_*.py")))
def test_kernel_is_its_twin(name):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "python_files=kernel_*.py", name]
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr  # nonzero too where no test was found
