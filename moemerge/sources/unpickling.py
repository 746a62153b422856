"""An interpreter for PyTorch pickles that knows tensors and nothing else.

It follows the instructions of `torch.load(weights_only=True)`, but imports, calls and builds nothing: names stay
names, sizes stay numbers, and a key is a text or a small number, so that a hostile pickle can neither run nor grow.
https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only-security
"""

import pickle
import re
import struct
from collections.abc import Callable
from typing import Any, Final

from moemerge.sources.pickle_objects import MADE, Name, Opaque, Storage, storage_dtype

MAX_PICKLE_BYTES: Final = 4 * 2**20
"""Largest pickle of a table in bytes; for a model of 70 B parameters it has 0.1 MB."""
_MAX_INSTRUCTIONS: Final = 500_000  # 15 000 tensors, in half a second
# Names that weights_only allows, except those that only its own users can add.
_KNOWN: Final = re.compile(
    r"torch\.(cuda\.)?\w+Storage|torch\.storage\.(Untyped|Typed)Storage|torch\.(q?u?int|b?float|complex|bits|bool)\w*"
    r"|torch\.(Size|device|Tensor|nn\.parameter\.Parameter|_tensor\._rebuild_from_type_v2|serialization\._get_layout)"
    r"|torch\.per_(tensor|channel)_\w+|torch\._utils\._rebuild_\w+|collections\.(OrderedDict|Counter)|_codecs\.encode"
    r"|(builtins|__builtin__)\.(bytearray|set|complex)"
)


def unpickle(data: bytes) -> Any:
    """Read what a pickle holds: tables, lists, texts and numbers, `StridedTensor`, `Opaque`.

    Raises:
        ValueError: the pickle is damaged, or holds something that no table of weights does.
    """
    machine = _Machine(data)
    try:
        return machine.run()
    except (AttributeError, LookupError, TypeError, struct.error) as error:
        raise ValueError(f"damaged at byte {machine.place}: {type(error).__name__}") from error


class _Machine:
    """A stack, the stacks below marks, and the memo."""

    def __init__(self, data: bytes) -> None:
        self._data, self.place = data, 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        """Follow the instructions to the last."""
        for _ in range(_MAX_INSTRUCTIONS):
            instruction = self.take(1)
            if instruction == pickle.STOP:
                return self.stack.pop()
            if instruction not in _INSTRUCTIONS:
                raise ValueError(f"instruction {instruction!r} at byte {self.place - 1}, which no file of weights has")
            _INSTRUCTIONS[instruction](self)
        raise ValueError("it is longer than a table of weights")

    def take(self, count: int) -> bytes:
        """Read the next bytes."""
        self.place += count
        if self.place > len(self._data):
            raise ValueError("the pickle is cut off")
        return self._data[self.place - count : self.place]

    def number(self, code: str) -> Any:
        """Read the next number, in a format code of `struct`."""
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def push(self, value: Any) -> None:
        """Push a value onto the stack."""
        self.stack.append(value)

    def pop(self, count: int) -> tuple[Any, ...]:
        """Pop the last values."""
        if count > len(self.stack):
            raise IndexError
        taken = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return taken

    def pop_marked(self) -> list[Any]:
        """Pop the values since the last mark."""
        taken, self.stack = self.stack, self.marks.pop()
        return taken

    def mark(self) -> None:
        """Begin a group of values."""
        self.marks.append(self.stack)
        self.stack = []

    def name(self) -> None:
        """Push the name of a class, a function or a dtype."""
        end = self._data.index(b"\n", self._data.index(b"\n", self.place) + 1)
        text = ".".join(self.take(end - self.place).decode().split("\n"))
        self.take(1)
        if not _KNOWN.fullmatch(text):
            raise ValueError(f"it names {text[:60]!r}, which is not a part of weights")
        self.push(Name(text))

    def set_items(self, pairs: list[Any]) -> None:
        """Put keys and values into the table below them."""
        table = self.stack[-1]
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Other keys can take for ever: tuples of tuples to hash, chosen floats to tell apart.
            if type(table) is not dict or not (type(key) is str or (type(key) is int and abs(key) < 2**32)):
                raise ValueError(f"{type(key).__name__} as a key in {type(table).__name__}")
            table[key] = value

    def extend(self, values: list[Any]) -> None:
        """Append values to the list below them."""
        if type(self.stack[-1]) is not list:
            raise TypeError
        self.stack[-1].extend(values)

    def set_state(self) -> None:
        """Drop the attributes of an object, such as an `OrderedDict`'s versions of modules; none of them is needed."""
        self.pop(1)
        if not isinstance(self.stack[-1], dict | Opaque):
            raise TypeError

    def store(self) -> None:
        """Push a storage, by its persistent name."""
        kind, form, key, _device, count = self.pop(1)[0]
        if kind != "storage" or not isinstance(form, Name) or type(key) is not str or type(count) is not int:
            raise TypeError
        storage = Storage(key, storage_dtype(form), count)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError("two storages share a record")
        self.push(storage)

    def call(self) -> None:
        """Describe what a function would make of its arguments."""
        function, arguments = self.pop(2)
        if not isinstance(function, Name) or type(arguments) is not tuple:
            raise TypeError
        if function.text == "torch._tensor._rebuild_from_type_v2":  # a tensor that has attributes
            function, kind, arguments, _state = arguments
            if kind.text not in {"torch.Tensor", "torch.nn.parameter.Parameter"} or type(arguments) is not tuple:
                raise TypeError
        made = MADE.get(function.text)
        self.push(made(*arguments) if made else Opaque("an object", is_tensor=False))


_INSTRUCTIONS: Final[dict[bytes, Callable[[_Machine], Any]]] = {
    pickle.PROTO: lambda m: m.take(1),
    pickle.GLOBAL: _Machine.name,
    pickle.REDUCE: _Machine.call,
    pickle.NEWOBJ: _Machine.call,
    pickle.BUILD: _Machine.set_state,
    pickle.BINPERSID: _Machine.store,
    pickle.MARK: _Machine.mark,
    pickle.APPEND: lambda m: m.extend(list(m.pop(1))),
    pickle.APPENDS: lambda m: m.extend(m.pop_marked()),
    pickle.SETITEM: lambda m: m.set_items(list(m.pop(2))),
    pickle.SETITEMS: lambda m: m.set_items(m.pop_marked()),
    pickle.TUPLE: lambda m: m.push(tuple(m.pop_marked())),
    pickle.TUPLE1: lambda m: m.push(m.pop(1)),
    pickle.TUPLE2: lambda m: m.push(m.pop(2)),
    pickle.TUPLE3: lambda m: m.push(m.pop(3)),
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.EMPTY_SET: lambda m: m.push(Opaque("set", is_tensor=False)),
    pickle.BININT: lambda m: m.push(m.number("<i")),
    pickle.BININT1: lambda m: m.push(m.number("<B")),
    pickle.BININT2: lambda m: m.push(m.number("<H")),
    pickle.BINFLOAT: lambda m: m.push(m.number(">d")),
    pickle.LONG1: lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
    pickle.BINUNICODE: lambda m: m.push(m.take(m.number("<I")).decode()),
    pickle.SHORT_BINSTRING: lambda m: m.push(m.take(m.number("<B")).decode()),
    pickle.BINGET: lambda m: m.push(m.memo[m.number("<B")]),
    pickle.LONG_BINGET: lambda m: m.push(m.memo[m.number("<I")]),
    pickle.BINPUT: lambda m: m.memo.__setitem__(m.number("<B"), m.stack[-1]),
    pickle.LONG_BINPUT: lambda m: m.memo.__setitem__(m.number("<I"), m.stack[-1]),
}
