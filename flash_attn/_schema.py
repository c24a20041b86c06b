"""What an operator's declaration says: its schema, and the place of each of its arguments.

An operator is declared by the signature of a function (``_functions.py``). A call is the tuple of
all its arguments in that order, defaults included; nothing else in this package lists them.
"""

from __future__ import annotations

import functools
import inspect
from operator import itemgetter
from typing import Callable

from flash_attn import _buffers as buffers
from flash_attn._arguments import as_int, check_optional, check_tensors, flag, four_dims, number
from flash_attn._eager import refuse_tangents

_TENSOR, _OPTIONAL = "Tensor", "Optional[Tensor]"
_SCHEMA_TYPES = {
    _TENSOR: "Tensor",
    _OPTIONAL: "Tensor?",
    "float": "float",
    "bool": "bool",
    "int": "SymInt",
    "Optional[torch.dtype]": "ScalarType?",
}
_NUMBERS = {"float": (float, number), "bool": (bool, flag), "int": (int, as_int)}
_MISSING = object()


class Operator:
    """An operator: what its declaration says, and how it is run.

    Attributes of the declaration:
        name: in ``torch.ops.flash_attn``.
        schema: without the name.
        names: of the arguments, in order.
        place: index of each name.
        tensors, required, optional: places of tensors; of those that cannot and can be None.
        required_of, optional_of: functions that pick these from a call's arguments.
        written: places of tensors that a call writes to.
        differentiable: places of those with a gradient.
        sequences: slice of cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k; may be empty.
        layout: of the batch, dense or packed.
        dropout_p, return_softmax: places of these, if it has them.

    Attributes that the modules above set:
        function: of the library; takes a call's arguments, then buffers of results
            (``_kernels.py``).
        kernel: ``kernel(args, wants_all=True)`` computes the results (``_kernels.py``).
        overload: torch's operator (``_ops.py``).
        record: ``record(args)`` computes the results so that gradients can follow.
        dispatch: ``dispatch(args)`` computes the results through torch's dispatcher.
        backward: the operator of the gradients, if any (the last three: ``_autograd.py``).
    """

    def __init__(self, declaration: Callable, results: str, written: str, differentiable: str):
        self.name = declaration.__name__
        self.signature = inspect.signature(declaration)
        self.names = tuple(self.signature.parameters)
        self.place = {name: i for i, name in enumerate(self.names)}
        self.written = self.places(written)
        self.differentiable = self.places(differentiable)
        self.schema = self._schema(results)
        self._find_tensors()
        self._find_numbers()
        self._find_tails()
        self.dropout_p, self.return_softmax = map(self.place.get, ("dropout_p", "return_softmax"))
        self.kernel = self.overload = self.record = self.backward = None
        self.dispatch = self.through_dispatcher

    def places(self, names: str) -> tuple[int, ...]:
        """Return the places of the named arguments."""
        return tuple(self.place[name] for name in names.split())

    def getter(self, names: str) -> Callable[[tuple], tuple]:
        """Return a function that picks the named arguments, two or more, from a call's."""
        return itemgetter(*self.places(names))

    def _schema(self, results: str) -> str:
        aliases = dict(zip(self.written, "abcdefgh"))
        declared, keyword_only = [], False
        for place, parameter in enumerate(self.signature.parameters.values()):
            if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
                keyword_only = True
                declared.append("*")
            kind = _SCHEMA_TYPES[parameter.annotation]
            if place in aliases:
                kind = kind.replace("Tensor", f"Tensor({aliases[place]}!)")
            default = "" if parameter.default is parameter.empty else f"={parameter.default}"
            declared.append(f"{kind} {parameter.name}{default}")
        return f"({', '.join(declared)}) -> {results}"

    def _find_tensors(self) -> None:
        kinds = [p.annotation for p in self.signature.parameters.values()]
        self.required = tuple(i for i, kind in enumerate(kinds) if kind == _TENSOR)
        self.optional = tuple(i for i, kind in enumerate(kinds) if kind == _OPTIONAL)
        self.required_of, self.optional_of = itemgetter(*self.required), itemgetter(*self.optional)
        self.tensors = tuple(sorted(self.required + self.optional))
        self.biases = tuple(i for i in self.tensors if self.names[i].endswith("attn_bias"))
        first = self.place.get("cu_seqlens_q", 0)
        self.sequences = slice(first, first + 4 if first else 0)
        self.layout = buffers.PACKED if first else buffers.DENSE

    def _find_numbers(self) -> None:
        kinds = [p.annotation for p in self.signature.parameters.values()]
        self.numbers = tuple(i for i, kind in enumerate(kinds) if kind in _NUMBERS)
        self._conversions = tuple((i, *_NUMBERS[kinds[i]]) for i in self.numbers)

    def _find_tails(self) -> None:
        """Prepare what completes a call: the defaults of all arguments from each place on."""
        parameters = list(self.signature.parameters.values())
        self.num_positional = sum(p.kind is not p.KEYWORD_ONLY for p in parameters)
        defaults = [_MISSING if p.default is p.empty else p.default for p in parameters]
        self._tails = [
            dict(zip(self.names[i:], defaults[i:])) for i in range(self.num_positional + 1)
        ]

    def complete(self, args: tuple, kwargs: dict) -> tuple:
        """Return all arguments of a call in order; the call is one that the schema allows."""
        return (*args, *{**self._tails[len(args)], **kwargs}.values())

    def named(self, given: dict) -> tuple:
        """Return a call's arguments in order, from their names; one that is not given is None."""
        return tuple(map(given.get, self.names))

    def bind(self, args: tuple, kwargs: dict) -> tuple:
        """Return all arguments of any call in order, or raise TypeError as a function does."""
        if len(args) <= self.num_positional:
            complete = self.complete(args, kwargs)
            if len(complete) == len(self.names) and not any(x is _MISSING for x in complete):
                return complete
        bound = self.signature.bind(*args, **kwargs)  # raises TypeError
        return self.complete((), bound.arguments)

    def check(self, args) -> None:
        """Raise TypeError for the first argument that should be a tensor and is not."""
        check_tensors(**{self.names[place]: args[place] for place in self.required})
        check_optional(**{self.names[place]: args[place] for place in self.optional})

    def converted(self, args) -> tuple:
        """Return arguments of any kind as the operator's; raise TypeError for what cannot be."""
        self.check(args)
        args = list(args)
        for place, kind, convert in self._conversions:
            if args[place].__class__ is not kind:
                args[place] = convert(self.names[place], args[place])
        for place in self.biases:
            args[place] = four_dims(args[place])
        return tuple(args)

    def keywords(self, args) -> dict:
        """Return those of a call's arguments that torch takes by keyword only."""
        return dict(zip(self.names[self.num_positional :], args[self.num_positional :]))

    def through_dispatcher(self, args):
        """Call torch's operator."""
        return self.overload(*args[: self.num_positional], **self.keywords(args))

    def redispatch(self, keyset, args):
        """Call the operator's kernel for ``keyset``."""
        positional = args[: self.num_positional]
        return self.overload.redispatch(keyset, *positional, **self.keywords(args))


def declare(results: str, written: str = "", differentiable: str = "") -> Callable:
    """Decorate a signature with a docstring: the function then calls the operator it declares.

    Args:
        results: of the schema.
        written: the names of tensors that the operator writes to.
        differentiable: the names of tensors in which its results have a gradient.

    The function has the operator as its attribute ``operator``.
    """

    def decorate(declaration: Callable) -> Callable:
        operator = Operator(declaration, results, written, differentiable)

        @functools.wraps(declaration)
        def function(*args, **kwargs):
            args = operator.bind(args, kwargs)
            if not operator.differentiable:
                refuse_tangents(operator.name, *(args[place] for place in operator.tensors))
            return operator.through_dispatcher(operator.converted(args))

        function.operator = operator
        return function

    return decorate
