"""docs/extending.md: its example fits the sources, and what it says of forgotten places is so."""

import inspect
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from flash_attn._composition import Settings
from flash_attn._functions import FORWARD, VARLEN_FORWARD, _flash_attn_forward
from flash_attn._schema import Operator

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


def with_score_shift() -> Operator:
    """Return the dense forward operator with the number that the example adds."""

    def declaration():
        pass

    given = inspect.signature(_flash_attn_forward).parameters.values()
    kind = inspect.Parameter.KEYWORD_ONLY
    shift = inspect.Parameter("score_shift", kind, default=0.0, annotation="float")
    declaration.__signature__ = inspect.Signature([*given, shift])
    return Operator(declaration, "(Tensor out)", "", "q k v")


def numbers(operator: Operator, **given):
    """Return numbers of a call: the defaults, or 0, but for those given."""
    parameters = operator.signature.parameters
    names = [operator.names[place] for place in operator.numbers]
    defaults = {x: 0 if (d := parameters[x].default) is inspect._empty else d for x in names}
    return tuple({**defaults, **given}.values())


def test_composed_derivatives_refuse_a_number_that_they_do_not_apply():
    operator, state = with_score_shift(), torch.zeros(2, dtype=torch.int64)
    assert Settings(operator, numbers(operator, softcap=2.0), (), state).softcap == 2.0
    with pytest.raises(RuntimeError, match=r"no derivative .* with score_shift: .*_composition.py"):
        Settings(operator, numbers(operator, score_shift=0.5), (), state)


@pytest.mark.parametrize("operator", [FORWARD, VARLEN_FORWARD])
def test_composed_derivatives_know_every_number(operator):
    given = dict.fromkeys((operator.names[place] for place in operator.numbers), 7)
    settings = Settings(operator, numbers(operator, **given), (), None)
    assert {name: vars(settings)[name] for name in given} == given
