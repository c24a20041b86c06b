"""The example of docs/extending.md fits the sources."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_example_of_an_argument_applies():
    text = (ROOT / "docs" / "extending.md").read_text()
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    command = ["git", "apply", "--check", "--unidiff-zero", "--verbose", "-"]
    result = subprocess.run(command, cwd=ROOT, input=diff, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    files = re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)
    assert len(files) == len(set(files)) == 5
