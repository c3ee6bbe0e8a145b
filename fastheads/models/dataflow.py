"""Read the source of a layer's forward: what is the output of one of its children added to?

Values are numbered: a name that is assigned anew is a new value, an alias is the same one. The walk follows the child's output,
the *branch*, through norms, dropout and multiplications to the sum with a value that the child's input was computed from, or
that is a parameter of the forward: the residual stream. Sums with anything else, as in parallel blocks, belong to the branch.

What the walk does not understand is a value of its own, so that it leads to no answer rather than to a wrong one.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from types import FunctionType, MethodType
from typing import Any

from torch import nn

# Methods that leave the numbers as they are, but for the dtype.
SAME_NUMBERS = ("to", "float", "type_as", "contiguous", "clone", "detach")
# Parameters that may be a residual stream where nothing else tells: the second one of BERT's output, or of Bloom's attention.
STREAM_NAMES = re.compile(r"residual|input_tensor|hidden_states")
MAX_DEPTH = 2  # of methods and functions that are read where they are called


class UnreadableError(Exception):
    """The source of a forward is not to be had, or does not say what the branch is added to."""


@dataclass(eq=False, repr=False)  # values lead to one another: their text would have no end
class Value:
    """The value of an expression. `ancestors`: the values that it was computed from."""

    parameter: str | None = None  # of the forward, as it was passed
    path: str | None = None  # an attribute of the module: "norm", "self_attn.0"
    is_branch: bool = False
    product: "tuple[Value, str] | None" = None  # of a value and an attribute of the module
    options: "tuple[Value, ...]" = ()  # where it depends on the call which value it is
    ancestors: "set[Value]" = field(default_factory=set)
    read_by: list[str] = field(default_factory=list)  # paths of children that have it as their first argument
    items: "tuple[Value, ...] | None" = None
    uses: list[str] = field(default_factory=list)  # paths of children, "return", or "else"
    is_overwritten: bool = False  # by an operation in place


@dataclass(frozen=True)
class Stream:
    """The value that the branch is added to: parameter `name`, number `position`, of the module's forward, or the first argument
    of its child `child`; times the module's attribute `multiplier`. `norm`: the child that has only the sum, after it.
    """

    name: str = ""
    position: int = 0
    child: str | None = None
    multiplier: str | None = None
    norm: str | None = None
    is_returned: bool = False  # the sum is all that becomes of it in this module
    in_place: bool = False  # it is overwritten, by the sum or later


def stream_in(module: nn.Module, target: str) -> Stream | None:
    """Find what the output of the child `target` of `module` is added to; None if `module` returns that output unadded.

    Raises UnreadableError if that cannot be read from the source.
    """
    forward = _forward_of(module)
    walk = _Walk(module, target)
    walk.call(forward, None)
    if not walk.results:
        raise UnreadableError(f"its forward does not call {target}")
    found = {_stream_of(walk, forward, *addition) for addition in walk.additions}
    if len(found) > 1:
        raise UnreadableError(f"it adds {target} to several things")
    if not found and not walk.returns_branch:
        raise UnreadableError(f"its forward does not show what {target} is added to")
    if found and walk.returns_branch:
        raise UnreadableError(f"it adds {target} in some cases only")
    return found.pop() if found else None


def norm_after(module: nn.Module, target: str) -> tuple[str | None, bool]:
    """Return the norm that alone reads what `target` gives in `module`, else None; and True if `module` only returns it."""
    walk = _Walk(module, target)
    walk.call(_forward_of(module), None)
    uses = [use for result in walk.results for use in result.uses]
    return walk.norm_of(uses), set(uses) == {"return"}


def _forward_of(module: nn.Module) -> FunctionType:
    own = vars(module).get("forward")
    if own is not None and "_hf_hook" in vars(module):  # accelerate's: it calls what was there before
        own = vars(module).get("_old_forward")
    if own is None:
        own = type(module).forward
    elif not isinstance(own, MethodType) or own.__self__ is not module:
        raise UnreadableError("its forward has been replaced")
    function = inspect.unwrap(own)
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType):
        raise UnreadableError("its forward is no function of Python")
    return function


@cache
def _parsed(function: FunctionType) -> ast.FunctionDef:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        raise UnreadableError("the source of its forward cannot be read") from error
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.name != function.__name__:
        raise UnreadableError("the source of its forward cannot be read")
    return definition


def _parameters(function: FunctionType) -> list[str]:
    """Return the names of the parameters that can be passed by position."""
    arguments = _parsed(function).args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args)]


def _stream_of(walk: "_Walk", forward: FunctionType, stream: Value, total: Value) -> Stream:
    multiplier = None
    if stream.product is not None:
        stream, multiplier = stream.product
    in_place = stream.is_overwritten
    facts: dict[str, Any] = dict(
        **dict(multiplier=multiplier, norm=walk.norm_of(total.uses), in_place=in_place),
        is_returned=set(total.uses) == {"return"},
    )
    if stream.parameter is not None:
        names = _parameters(forward)[1:]  # without self
        position = names.index(stream.parameter) if stream.parameter in names else len(names)
        return Stream(stream.parameter, position, **facts)
    # A child that is called more than once has other inputs too.
    once = [path for path in stream.read_by if walk.called.count(path) == 1]
    if not once:
        raise UnreadableError("no module's input is what it adds to")
    return Stream(child=once[0], **facts)


class _Walk:
    """One walk through a forward; `additions` are the sums of the branch with the stream: (stream, sum)."""

    def __init__(self, module: nn.Module, target: str) -> None:
        self.module, self.target = module, target
        self.additions: list[tuple[Value, Value]] = []
        self.results: list[Value] = []  # of the target's calls
        self.called: list[str] = []  # paths of children, in the order of their calls
        self.norms: set[str] = set()
        self.returns_branch = False
        self._feeding: set[Value] = set()  # what the target's arguments were computed from
        self._names: dict[str, Value] = {}
        self._globals: dict[str, Any] = {}
        self._first: Value | None = None  # the forward's first argument
        self._returned: list[Value] = []
        self._depth = 0
        self._numbers: dict[str, str] = {}  # of variables that number children, in the target's path

    # ---------------------------------------------------------------- functions

    def call(self, function: FunctionType, given: dict[str, Value] | None) -> Value:
        """Walk through a function; `given`: its arguments, None for the forward itself. Return what it returns."""
        definition = _parsed(function)
        arguments = definition.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        if given is None:
            given = {name: Value(parameter=name) for name in names[1:]} | {names[0]: Value(path="")}
            self._first = given[names[1]] if len(names) > 1 else None
        before = self._names, self._globals, self._returned
        self._names = {name: Value() for name in names} | given
        self._globals, self._returned = function.__globals__, []
        self._block(definition.body)
        returned = self._returned
        self._names, self._globals, self._returned = before
        result = self._merged(returned) if returned else Value()
        if self._depth == 0:
            self.returns_branch = any(_holds_branch(value) for value in returned)
            for value in returned:
                for part in (value, *(value.items or ())):
                    part.uses.append("return")
        return result

    # ---------------------------------------------------------------- statements

    def _block(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                result = self._value(value)
                for target in targets:
                    self._assign(target, result)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, self._value(value))
            case ast.AugAssign(target=target, op=operator, value=value):
                operands = [self._value(target), self._value(value)]
                result = (self._sum if isinstance(operator, ast.Add) else self._computed)(operands)
                self._overwritten(operands[0])
                self._assign(target, result)
            case ast.If(test=test, body=body, orelse=orelse):
                known = self._decided(test)
                if known is None:
                    self._new([self._value(test)])
                    self._either(body, orelse)
                else:
                    self._block(body if known else orelse)
            case ast.For(target=target, iter=iterated, body=body, orelse=orelse):
                self._assign(target, self._computed([self._value(iterated)]))
                self._either([*body, *orelse], [])
            case ast.While(body=body, orelse=orelse):
                self._either([*body, *orelse], [])
            case ast.With(items=items, body=body):
                for item in items:
                    self._value(item.context_expr)
                self._block(body)
            case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=final):
                self._block(body)
                for handler in handlers:
                    self._either(handler.body, [])
                self._block([*orelse, *final])
            case ast.Return(value=value):
                if value is not None:
                    self._returned.append(self._value(value))
            case ast.Expr(value=value):
                self._value(value)
            case ast.Delete() | ast.Pass() | ast.Raise() | ast.Assert() | ast.Import() | ast.ImportFrom():
                pass
            case ast.Break() | ast.Continue():
                pass
            case _:
                for name in _assigned(node):
                    self._names[name] = Value()

    def _either(self, body: list[ast.stmt], orelse: list[ast.stmt]) -> None:
        before = dict(self._names)
        self._block(body)
        after, self._names = self._names, before
        self._block(orelse)
        for name in {*after, *self._names}:
            options = [names[name] for names in (after, self._names) if name in names]
            self._names[name] = self._merged(options)

    def _assign(self, target: ast.expr, value: Value) -> None:
        match target:
            case ast.Name(id=name):
                self._names[name] = value
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                for number, inner in enumerate(targets):
                    self._assign(inner, self._item(value, number))
            case ast.Starred(value=inner):
                self._assign(inner, Value())
            case ast.Subscript(value=inner):  # x[...] = y changes x
                before = self._value(inner)
                self._overwritten(before)
                self._assign(inner, self._computed([before, value]))

    def _item(self, value: Value, number: int) -> Value:
        if value.items is not None and -len(value.items) <= number < len(value.items):
            return value.items[number]
        if value.is_branch:  # a child's outputs: the first is what is passed on
            return value if number == 0 else Value()
        return self._computed([value])

    # ---------------------------------------------------------------- expressions

    def _value(self, node: ast.expr) -> Value:
        match node:
            case ast.Name(id=name):
                return self._names.get(name) or Value()
            case ast.Attribute(value=inner, attr=name):
                value = self._value(inner)
                if value.path is not None:
                    return Value(path=f"{value.path}.{name}".lstrip("."))
                return value if value.is_branch else Value(ancestors={value} | value.ancestors)
            case ast.Subscript(value=inner, slice=ast.Constant(value=int() as number)):
                value = self._value(inner)
                if value.path is not None:
                    return Value(path=f"{value.path}.{number}")
                return self._item(value, number)
            case ast.Subscript(value=inner, slice=index):
                value = self._value(inner)
                if value.path is not None and isinstance(index, ast.Name):
                    return Value(path=f"{value.path}.{{{index.id}}}")
                if isinstance(index, ast.Slice) and value.is_branch:
                    return Value()  # the rest of a child's outputs
                return self._computed([value, self._value(index)])
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                items = tuple(self._value(part) for part in parts)
                return Value(items=items, ancestors={a for item in items for a in (item, *item.ancestors)})
            case ast.BinOp(op=ast.Add()):
                return self._sum([self._value(part) for part in _terms(node)])
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return self._product(self._value(left), self._value(right))
            case ast.Call():
                return self._called(node)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                known = self._decided(test)
                if known is not None:
                    return self._value(body if known else orelse)
                return self._merged([self._value(body), self._value(orelse)])
            case ast.NamedExpr(target=target, value=inner):
                value = self._value(inner)
                self._assign(target, value)
                return value
            case ast.Starred(value=inner):
                return self._value(inner)
        return self._computed([self._value(part) for part in _inner(node)])

    def _called(self, node: ast.Call) -> Value:
        positional = [self._value(argument) for argument in node.args]
        named = {keyword.arg: self._value(keyword.value) for keyword in node.keywords}
        arguments = [*positional, *named.values()]
        match node.func:
            case ast.Name(id=name) if name not in self._names and any(map(_holds_branch, arguments)):
                function = self._globals.get(name)
                if isinstance(function, FunctionType) and self._depth < MAX_DEPTH:
                    return self._inlined(function, positional, named)
            case ast.Attribute(value=inner, attr=name) if name in SAME_NUMBERS:
                value = self._value(inner)
                if value.path is None:
                    return value
            case ast.Attribute(value=inner, attr=name) if name.endswith("_") and not name.endswith("__"):
                value = self._value(inner)
                result = (self._sum if name == "add_" else self._computed)([value, *arguments])
                self._overwritten(value)
                self._assign(inner, result)
                return result
        called = self._value(node.func)
        if called.path is None:
            return self._computed([called, *arguments])
        return self._child(self._numbered(called.path), positional, named)

    def _inlined(
        self, function: FunctionType, positional: list[Value], named: dict[str | None, Value]
    ) -> Value:
        given = dict(zip(_parameters(function), positional, strict=False))
        given |= {name: value for name, value in named.items() if name is not None}
        self._depth += 1
        try:
            return self.call(function, given)
        finally:
            self._depth -= 1

    def _numbered(self, path: str) -> str:
        """Put numbers for the variables in the path of a child, as "attentions.{i}" has them: those of the target."""
        variables = re.findall(r"{(\w+)}", path)
        fits = re.fullmatch(re.sub(r"\\{\w+\\}", r"(\\d+)", re.escape(path)), self.target)
        if variables and fits:
            self._numbers |= dict(zip(variables, fits.groups(), strict=True))
        for variable in variables:
            path = path.replace(f"{{{variable}}}", self._numbers.get(variable, "0"))
        return path

    def _child(self, path: str, positional: list[Value], named: dict[str | None, Value]) -> Value:
        """A call of the child at `path`, or of a method of the module."""
        arguments = [*positional, *named.values()]
        try:
            child = attrgetter(path)(_Children(self.module))
        except AttributeError:
            child = None
        if isinstance(child, _Children):
            self.called.append(path)
            if "Norm" in type(child.module).__name__:
                self.norms.add(path)
            first = next(iter(arguments), None)
            if first is not None:
                first.read_by.append(path)
                first.uses.append(path)
            if path == self.target:
                self._feeding |= {a for value in arguments for a in (value, *value.ancestors)}
                self.results.append(Value(is_branch=True))
                return self.results[-1]
            return self._computed(arguments, noted=first)
        method = getattr(type(self.module), path, None) if "." not in path else None
        if isinstance(method, FunctionType) and self._depth < MAX_DEPTH:
            static = isinstance(vars(type(self.module)).get(path), staticmethod)
            return self._inlined(method, positional if static else [Value(path=""), *positional], named)
        return self._computed(arguments)

    # ---------------------------------------------------------------- values

    def _computed(self, operands: list[Value], noted: Value | None = None) -> Value:
        """Return a new value that is computed from the operands: the branch still, if one of them is.

        Raises UnreadableError if another one is what the branch could be added to.
        """
        if any(map(_holds_branch, operands)) and any(map(self._is_hidden, operands)):
            raise UnreadableError(f"it combines {self.target} with what the stream may be, and not by a sum")
        return self._new(operands, noted)

    def _new(self, operands: list[Value], noted: Value | None = None) -> Value:
        for operand in operands:
            if operand is not noted:
                operand.uses.append("else")
        ancestors = {a for operand in operands for a in (operand, *operand.ancestors)}
        return Value(is_branch=any(map(_holds_branch, operands)), ancestors=ancestors)

    def _product(self, left: Value, right: Value) -> Value:
        product = self._computed([left, right])
        for value, factor in ((left, right), (right, left)):
            if factor.path and not product.is_branch and value.path is None:
                product.product = (value, factor.path)
        return product

    def _overwritten(self, value: Value) -> None:
        for overwritten in (value, *value.options):
            overwritten.is_overwritten = True

    def _sum(self, terms: list[Value]) -> Value:
        total = self._new(terms)
        if not total.is_branch:
            return total
        streams = [value for value in terms if not value.is_branch and self._is_stream(value)]
        if not streams:
            return total
        total.is_branch = False
        stream = streams[0] if len(streams) == 1 else Value()
        if stream.is_overwritten or (stream.product is not None and stream.product[0].is_overwritten):
            raise UnreadableError("it changes what it adds to in place")
        self.additions.append((stream, total))
        return total

    def _is_stream(self, value: Value) -> bool:
        base = value if value.product is None else value.product[0]
        if base in self._feeding or any(map(self._is_stream, value.options)):
            return True
        return base.parameter is not None and STREAM_NAMES.search(base.parameter) is not None

    def _is_hidden(self, value: Value) -> bool:
        """True for hidden states, as far as that can be seen: the first argument, and what modules read before the target."""
        if value is self._first or any(map(self._is_hidden, value.items or ())):
            return True
        return value in self._feeding and bool(value.read_by)

    def norm_of(self, uses: list[str]) -> str | None:
        """Return the norm that is the only use of a value; None if there are others."""
        return uses[0] if uses and all(path in self.norms for path in uses) else None

    def _merged(self, options: list[Value]) -> Value:
        first = options[0]
        if all(option is first for option in options):
            return first
        if all(o.items is not None for o in options) and len({len(o.items or ()) for o in options}) == 1:
            parts = zip(*(o.items or () for o in options), strict=True)
            return Value(items=tuple(self._merged(list(part)) for part in parts))
        merged = self._new(options)
        merged.options = tuple(options)
        return merged

    def _decided(self, test: ast.expr) -> bool | None:
        """Return the value of a condition on attributes of the module alone; None for others."""
        match test:
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                known = self._decided(operand)
                return None if known is None else not known
            case ast.BoolOp(op=operator, values=values):
                decided = [self._decided(value) for value in values]
                decisive = isinstance(operator, ast.Or)
                if decisive in decided:
                    return decisive
                return None if None in decided else not decisive
            case ast.Compare(
                left=ast.Name() as left, ops=[ast.Is() | ast.IsNot() as operator], comparators=[right]
            ) if isinstance(right, ast.Constant) and right.value is None:
                return isinstance(operator, ast.IsNot) if self._is_hidden(self._value(left)) else None
            case ast.Compare(left=left, ops=[operator], comparators=[right]):
                compare = _COMPARISONS.get(type(operator))
                a, b = self._constant(left), self._constant(right)
                if compare is None or a is _UNKNOWN or b is _UNKNOWN:
                    return None
                return bool(compare(a, b))
            case ast.Attribute():
                value = self._constant(test)
                return bool(value) if value is None or isinstance(value, bool | int | str) else None
        return None

    def _constant(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Attribute() if path := self._value(node).path:
                try:
                    value = attrgetter(path)(self.module)
                except Exception:  # a property of the module runs code of its own
                    return _UNKNOWN
                return value if value is None or isinstance(value, bool | int | float | str) else _UNKNOWN
        return _UNKNOWN


class _Children:
    """The modules inside a module, by attributes: those of a list by numbers too."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getattr__(self, name: str) -> "_Children":
        child = self.module._modules.get(name)
        if child is None:
            raise AttributeError(name)
        return _Children(child)


_UNKNOWN = object()
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
    ast.Gt: lambda a, b: a > b,
    ast.Lt: lambda a, b: a < b,
}


def _holds_branch(value: Value) -> bool:
    return value.is_branch or any(item.is_branch for item in value.items or ())


def _terms(node: ast.expr) -> Iterator[ast.expr]:
    """The terms of a sum, from left to right."""
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            yield from _terms(left)
            yield from _terms(right)
        case _:
            yield node


def _inner(node: ast.AST) -> Iterator[ast.expr]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield child
        elif not isinstance(child, ast.expr_context):
            yield from _inner(child)


def _assigned(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            yield inner.id
