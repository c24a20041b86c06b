"""README.md's support table is the library's, and its pictures are the ones that are kept."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest
from scripts import ROOT

import flash_attn


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


def test_switches_of_integrations_run_as_typed():
    """After ``import flash_attn`` alone, FlashAttention-3's names installed."""
    calls = []
    for page in ("README.md", "docs/integrations.md"):
        text = (ROOT / page).read_text()
        found = re.findall(r"`(flash_attn\.integrations\.[\w.]+\(.*?\))`", text)
        assert any("sdpa" in call for call in found)
        calls += found
    if importlib.util.find_spec("transformers") is None:
        calls = [call for call in calls if "sdpa" in call]
    program = "\n".join(["import flash_attn", *calls])
    paths = [str(ROOT / "hopper"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr


def test_unknown_attributes_are_errors():
    for module in (flash_attn, flash_attn.integrations):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no .* 'nothing'"):
            _ = module.nothing
