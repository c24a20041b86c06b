"""Fail if an #include of csrc/ points upwards in the layers of docs/architecture.md.

The rule is the table there, between the marks: the files of a folder may include each other, those
of the folders that its row lists, and what these may.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "architecture.md"
MARKS = "<!-- layers: checked by tools/check_includes.py -->", "<!-- end of layers -->"
# Where quoted includes are looked up, as in CMakeLists.txt.
SEARCHED = "csrc", "csrc/flash_attn/src", "csrc/*/include"
SUFFIXES = {".h", ".cpp", ".cu", ".inc", ".in"}
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def read_layers(text: str) -> dict[str, set[str]]:
    """Return, for each folder of the table, the folders that it may include, itself too.

    A row may list those that stand above it.
    """
    start, end = (text.index(mark) for mark in MARKS)
    layers = {}
    for line in text[start:end].splitlines():
        names = [re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:3]]
        if len(names) == 2 and names[0]:
            (folder,) = names[0]
            layers[folder] = {folder}.union(*(layers[name] for name in names[1]))
    return layers


def layer_of(path: Path, root: Path, layers) -> "str | None":
    """Return the longest folder of ``layers`` that holds ``path``."""
    name = path.relative_to(root).as_posix()
    folders = [folder for folder in layers if name == folder or name.startswith(folder + "/")]
    return max(folders, key=len, default=None)


def find(include: str, source: Path, root: Path) -> "Path | None":
    """Return the file that ``include`` names in ``source``; None if the tree has no such file."""
    for folder in (source.parent, *(path for name in SEARCHED for path in root.glob(name))):
        if (folder / include).is_file():
            return (folder / include).resolve()
    return None


def check_file(source: Path, root: Path, layers) -> list[str]:
    """Return a sentence for each include of ``source`` that its layer must not have."""
    layer = layer_of(source, root, layers)
    if layer is None:
        return [f"{source.relative_to(root)}: its folder is not in the table of layers"]
    faults = []
    for include in _INCLUDE.findall(source.read_text()):
        if include.startswith("generated/"):  # in the build folder
            continue
        found = find(include, source, root)
        used = None if found is None else layer_of(found, root, layers)
        if used is None:
            faults.append(f"{source.relative_to(root)}: no layer has {include}")
        elif used not in layers[layer]:
            faults.append(f"{source.relative_to(root)}: {layer} must not include {include}")
    return faults


def check(root: Path = ROOT, text: "str | None" = None) -> list[str]:
    """Return all faults of the tree at ``root``; ``text`` is docs/architecture.md."""
    layers = read_layers(TABLE.read_text() if text is None else text)
    sources = (path for path in sorted((root / "csrc").rglob("*")) if path.suffix in SUFFIXES)
    return [fault for source in sources for fault in check_file(source, root, layers)]


if __name__ == "__main__":
    faults = check()
    print("\n".join(faults) or "every include points downwards")
    sys.exit(bool(faults))
