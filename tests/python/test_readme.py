"""README.md's support table is the library's."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_support_table_is_up_to_date():
    script = [sys.executable, ROOT / "tools" / "support_table.py", "--check"]
    assert subprocess.run(script).returncode == 0, "run python tools/support_table.py"
