"""Writes the C interfaces as C++ that finds their functions, and fills their structs, by name.

    python generate_arguments.py generated/arguments.inc flash_attn.h layer_norm.h ...

For each ``typedef struct NAME_args`` of the headers: a list of rows {name, whether it is a tensor,
function that sets the member}. A struct in a struct adds its members. What is no argument of a
caller in Python, pointers to void and sizes of memory, is left out. For each function that takes
such a struct alone: a line in ``with_function``, with the function that tells its workspace, if the
headers have one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_STRUCT = re.compile(r"typedef struct (\w+_args) \{(.*?)\} \1;", re.DOTALL)
_MEMBER = re.compile(r"\s*(?:const )?(\w+)\s*(\*?.+)", re.DOTALL)
_FUNCTION = re.compile(r"flash_attn_status\s+flash_attn_(\w+)\(const (\w+_args)\* args\);")
_WORKSPACE = re.compile(r"flash_attn_(\w+)_workspace_size\(")
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


def dispatch(text: str) -> Iterator[str]:
    """Yield the C++ function that finds a function of the headers, a line each."""
    with_workspace = set(_WORKSPACE.findall(text))
    yield "template <class Visit>"
    yield "auto with_function(const std::string& name, const Visit& visit) {"
    for name, args in _FUNCTION.findall(text):
        functions = f"flash_attn_{name}"
        if name in with_workspace:
            functions += f", flash_attn_{name}_workspace_size"
        yield f'  if (name == "{name}") return visit(Entry<{args}>{{{functions}}});'
    yield '  raise("ValueError", "there is no function " + name);'
    yield "}"


def main(output: str, *headers: str) -> None:
    text = "\n".join(_COMMENT.sub("", Path(header).read_text()) for header in headers)
    structs = dict(_STRUCT.findall(text))
    calls = [name for name in structs if "void* stream" in structs[name]]
    lines = [line for name in calls for line in rows(structs, name)]
    Path(output).write_text("\n".join([*lines, *dispatch(text)]) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
