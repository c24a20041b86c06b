"""README.md's support table is the library's, and its pictures are the ones that are kept."""

import re
import shutil
import subprocess
import sys

import pytest
from scripts import ROOT


def test_support_table_is_up_to_date():
    script = [sys.executable, ROOT / "tools" / "support_table.py", "--check"]
    assert subprocess.run(script).returncode == 0, "run python tools/support_table.py"


def test_pictures_in_git_are_those_of_the_readme():
    """The others are drawn from their tables."""
    shown = re.findall(r"!\[[^]]*\]\(([^)]+\.png)\)", (ROOT / "README.md").read_text())
    assert 1 <= len(shown) <= 2
    assert all((ROOT / path).is_file() for path in shown)
    if not ((ROOT / ".git").exists() and shutil.which("git")):
        pytest.skip("no git checkout")
    command = ["git", "-c", "safe.directory=*", "ls-files", "*.png"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert listed.stdout.split() == shown
