"""Reads pickles as data. Nothing is imported, constructed or called, whatever a pickle holds.

``pickle.loads`` runs what a pickle names. Here, a class that a pickle names stays a name, and its instance a
record of its state. Only the classes of answers of known SDKs may be named; every other opcode or name that
could run something is refused. Size is bounded: a pickle may refer to one object many times, so what it
expands to is counted.
"""

from __future__ import annotations

import base64
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

_ANSWERS: Final = re.compile(
    r"((openai|together|groq|anthropic)\.types|huggingface_hub\.inference\._generated\.types)(\.[A-Za-z0-9_]+)*"
    r"|google\.genai\.types"
)
_GOOGLE: Final = "google"
_HUB: Final = "huggingface_hub"
_ADDED: Final = frozenset({"sdk_http_response", "parsed", "automatic_function_calling_history"})
"""The fields that Google's SDK adds to an answer."""
_CLASS: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_DEEPEST: Final = 100  # levels of a value
_SHOWN: Final = 80  # characters of a name in an error
_SCALARS: Final = frozenset({str, int, float, bool, bytes, type(None)})
_VALUES: Final = frozenset(
    {"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"}
    | {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
    | {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
)
"""Opcodes that push their argument."""


class BadPickle(ValueError):  # noqa: N818 - names the thing at fault
    """A pickle holds something else than plain data and answers of SDKs; the message says what."""


class Global(NamedTuple):
    """The name of a class of answers."""

    module: str
    name: str

    @property
    def package(self) -> str:
        """The SDK that the class belongs to."""
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Instance:
    """An instance of a class of answers: its name and its state, as data.

    Attributes:
        kind: the class.
        state: what pydantic writes: the values of the fields, and which of them were set. Of a dataclass of
            Hugging Face's, the values of the fields.
    """

    def __init__(self, kind: Global) -> None:
        self.kind = kind
        self.state: Mapping[str, Any] = {}

    def __repr__(self) -> str:
        return f"<Instance of {self.kind}>"


def read(data: bytes) -> Any:
    """Return the value of a pickle: plain values, and an `Instance` for each instance of an SDK's class.

    Raises:
        BadPickle: when it holds anything else, or is damaged.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if machine.step(opcode.name, argument):
                break
        return machine.pop()
    except BadPickle:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise BadPickle(f"it is damaged ({type(error).__name__}: {error!s:.{_SHOWN}})") from None


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise BadPickle("it is damaged: its stack is empty")
        return self.stack.pop()

    def marked(self) -> list[Any]:
        """Take what lies above the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def step(self, name: str, argument: Any) -> bool:
        """Perform an opcode; return True at the end of the pickle."""
        if name in _VALUES:
            self.stack.append(argument)
            return False
        if name == "STOP":
            return True
        perform = _OPCODES.get(name)
        if perform is None:
            raise BadPickle(f"it holds the opcode {name}, which no plain data needs")
        perform(self, argument)
        return False

    # Each method below performs some opcodes.

    def skip(self, _: Any) -> None:
        pass

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def drop(self, _: Any) -> None:
        self.pop()

    def drop_marked(self, _: Any) -> None:
        self.marked()

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def get(self, place: int) -> None:
        self.stack.append(self.memo[place])

    def append(self, _: Any) -> None:
        self.extended([self.pop()])

    def appends(self, _: Any) -> None:
        self.extended(self.marked())

    def extended(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise BadPickle("it appends to something else than a list")
        target.extend(items)

    def setitem(self, _: Any) -> None:
        value, name = self.pop(), self.pop()
        self.set([name, value])

    def setitems(self, _: Any) -> None:
        self.set(self.marked())

    def set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Instance and target.kind.package == _HUB:
            return  # its classes are mappings too, whose items repeat the fields
        if type(target) is not dict:
            raise BadPickle("it sets items of something else than a mapping")
        target.update(_mapping(items))

    def additems(self, _: Any) -> None:
        items = self.marked()
        target = self.stack[-1]
        if type(target) is not set:
            raise BadPickle("it adds items to something else than a set")
        target.update(_set(items))

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(_named(module, name))

    def stack_name(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise BadPickle("it names a class by something else than strings")
        self.stack.append(_named(module, name))

    def new(self, _: Any) -> None:
        arguments, kind = self.pop(), self.pop()
        if type(kind) is not Global or arguments != ():
            raise BadPickle("it makes an instance with arguments, or of something else than a class")
        self.stack.append(Instance(kind))

    def member(self, _: Any) -> None:
        """Return the string that is the value of a member of one of Google's enumerations."""
        arguments, kind = self.pop(), self.pop()
        of_google = type(kind) is Global and kind.package == _GOOGLE
        if not of_google or type(arguments) is not tuple or [*map(type, arguments)] != [str]:
            raise BadPickle("it holds the opcode REDUCE for something else than a member of an enumeration")
        self.stack.append(arguments[0])

    def build(self, _: Any) -> None:
        state = self.pop()
        target = self.stack[-1]
        if type(target) is not Instance or type(state) is not dict or not {*map(type, state)} <= {str}:
            raise BadPickle("it sets the state of something else than an answer")
        target.state = state


def _mapping(items: list[Any]) -> dict[Any, Any]:
    # Equal hashes of many other keys would take quadratic time.
    if len(items) % 2 or not {*map(type, items[::2])} <= {str}:
        raise BadPickle("it holds a mapping whose keys are not strings")
    return dict(zip(items[::2], items[1::2], strict=True))


def _set(items: list[Any]) -> set[Any]:
    if not {*map(type, items)} <= {str}:
        raise BadPickle("it holds a set of something else than strings")
    return {*items}


def _named(module: str, name: str) -> Global:
    if module.partition(".")[0] == "torch":
        raise BadPickle(
            "it holds tensors of a model of transformers. CacheSaver stores neither the model nor the "
            "tokenizer, so nobody knows which model wrote these tokens, and which texts they are"
        )
    if not _ANSWERS.fullmatch(module) or not _CLASS.fullmatch(name):
        raise BadPickle(
            f"it names {f'{module}.{name}':.{_SHOWN}}, which is not a class of an answer of OpenAI's, "
            "Together's, Groq's, Anthropic's, Google's or Hugging Face's SDK"
        )
    return Global(module, name)


def _pushes(make: Callable[[_Machine], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(make(machine))


_OPCODES: Final[Mapping[str, Callable[[_Machine, Any], None]]] = {
    "PROTO": _Machine.skip,
    "FRAME": _Machine.skip,
    "MARK": _Machine.mark,
    "POP": _Machine.drop,
    "POP_MARK": _Machine.drop_marked,
    "DUP": _pushes(lambda machine: machine.stack[-1]),
    "MEMOIZE": _Machine.memoize,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "NONE": _pushes(lambda _: None),
    "NEWTRUE": _pushes(lambda _: True),
    "NEWFALSE": _pushes(lambda _: False),
    "EMPTY_LIST": _pushes(lambda _: []),
    "EMPTY_DICT": _pushes(lambda _: {}),
    "EMPTY_SET": _pushes(lambda _: set()),
    "EMPTY_TUPLE": _pushes(lambda _: ()),
    "LIST": _pushes(_Machine.marked),
    "DICT": _pushes(lambda machine: _mapping(machine.marked())),
    "TUPLE": _pushes(lambda machine: tuple(machine.marked())),
    "FROZENSET": _pushes(lambda machine: _set(machine.marked())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "ADDITEMS": _Machine.additems,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "NEWOBJ": _Machine.new,
    "REDUCE": _Machine.member,
    "BUILD": _Machine.build,
}


class Plain:
    """Converts values that `read` returned to plain data.

    Args:
        most: the largest size of all values together, in bytes of their texts and a few for each other part.
    """

    def __init__(self, most: int) -> None:
        self._left = most

    def of(self, value: Any, depth: int = 0) -> Any:
        """Return a value with each instance as a mapping of the fields that were set, as its JSON had them.

        Raises:
            BadPickle: when it nests too deep, is too large, or holds what JSON does not have.
        """
        kind = type(value)
        self._left -= 8 + _size(value)
        if self._left < 0:
            raise BadPickle("it expands to much more than its own size")
        if depth > _DEEPEST:
            raise BadPickle(f"it nests more than {_DEEPEST} levels deep")
        if kind in _SCALARS:
            return value
        if kind is list:
            return [self.of(item, depth + 1) for item in value]
        if kind is tuple:
            return tuple([self.of(item, depth + 1) for item in value])
        if kind is dict:
            return self._mapping(value, depth)
        if kind is Instance:
            return self._mapping(_fields(value), depth)
        raise BadPickle(f"it holds a {'class' if kind is Global else kind.__name__} as a value")

    def _mapping(self, value: Mapping[str, Any], depth: int) -> dict[str, Any]:
        return {self.of(name): self.of(item, depth + 1) for name, item in value.items()}


def _size(value: Any) -> int:
    """Return the size of a text or a number in bytes; 0 for other values."""
    if type(value) is int:
        return value.bit_length() // 8
    return len(value) if type(value) in (str, bytes) else 0


def _fields(instance: Instance) -> dict[str, Any]:
    """Return the fields of an answer that were set: those that its JSON had."""
    if instance.kind.package == _HUB:  # which sets a field that is absent to None
        return {name: item for name, item in instance.state.items() if item is not None}
    values = instance.state.get("__dict__")
    were_set = instance.state.get("__pydantic_fields_set__")
    extra = instance.state.get("__pydantic_extra__") or {}
    if type(values) is not dict or type(were_set) is not set or type(extra) is not dict:
        raise BadPickle(f"it holds a {instance.kind} that pydantic 2 has not written")
    found = {name: item for name, item in values.items() if name in were_set}
    if instance.kind.package == _GOOGLE:
        found = {_camel(name): _text(item) for name, item in found.items() if name not in _ADDED}
    return found | extra


def _camel(name: str) -> str:
    """Return a name as Google's JSON has it, such as ``finishReason``."""
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))


def _text(value: Any) -> Any:
    """Return bytes as Google's JSON has them; other values unchanged."""
    return base64.b64encode(value).decode() if type(value) is bytes else value
