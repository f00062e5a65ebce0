import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@pytest.fixture
def command():
    """Runs `python FILE ARGUMENTS...` of the project; returns (status, output, errors)."""
    def call(file, *arguments, **options):
        done = subprocess.run([sys.executable, ROOT / file, *map(str, arguments)], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)
        return done.returncode, done.stdout, done.stderr
    return call
