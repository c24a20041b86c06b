"""Writes the arguments of the C interface as C++ that fills its structs, by name.

    python generate_arguments.py flash_attn.h generated/arguments.inc

For each ``typedef struct NAME_args`` of the header: a list of rows {name, whether it is a tensor,
function that sets the member}. A struct in a struct adds its members. What is no argument of a
caller in Python, pointers to void and sizes of memory, is left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_STRUCT = re.compile(r"typedef struct (\w+_args) \{(.*?)\} \1;", re.DOTALL)
_MEMBER = re.compile(r"\s*(?:const )?(\w+)\s*(\*?.+)", re.DOTALL)
_NOT_FROM_PYTHON = ("void", "size_t")


def members(structs: dict[str, str], name: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield type and name of a struct's members, those of a struct in it as ``outer.inner``."""
    for declaration in structs[name].split(";")[:-1]:
        kind, declarators = _MEMBER.fullmatch(declaration).groups()
        for declarator in declarators.split(","):
            member = prefix + declarator.strip(" \n*")
            if kind in structs:
                yield from members(structs, kind, member + ".")
            elif kind not in _NOT_FROM_PYTHON:
                yield kind, member


def rows(structs: dict[str, str], name: str) -> Iterator[str]:
    """Yield the C++ list of a struct's arguments, a line each."""
    yield "template <>"
    yield f"inline constexpr auto kArguments<{name}> = std::to_array<Argument<{name}>>({{"
    for kind, member in members(structs, name):
        own_name = member.rpartition(".")[2]
        is_tensor = str(kind == "flash_attn_tensor").lower()
        setter = f"[]({name}& args, const Value& x) {{ args.{member} = x; }}"
        yield f'    {{"{own_name}", {is_tensor}, {setter}}},'
    yield "});"


def main(header: str, output: str) -> None:
    structs = dict(_STRUCT.findall(_COMMENT.sub("", Path(header).read_text())))
    calls = [name for name in structs if "void* stream" in structs[name]]
    lines = [line for name in calls for line in rows(structs, name)]
    Path(output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
