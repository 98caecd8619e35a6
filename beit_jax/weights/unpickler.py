"""Unpickles with placeholders, within bounds of time, memory and nesting.

    Unpickler(io.BytesIO(content)).load()

Python's own unpickler trusts its input in three more ways than that of running code: a few bytes
ask for any amount of memory, keys that hash alike make a dict quadratic, and a value that refers
to itself many times over is small as a file and endless for who walks through it. What a training
script saves comes nowhere near the bounds here.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from beit_jax.types import PyTree
from beit_jax.weights.placeholders import Names, Record, Refused

_MOST_STEPS = 4_000_000  # opcodes; a checkpoint of BEiT-large with its optimizer has 40,000
_MOST_OPEN = 20_000  # values that wait for the end of one; a pickler fills a dict by thousands
_DEEPEST = 300
_MOST_VALUES = 4_000_000  # in dicts within dicts; one that is referred to twice counts twice
_WALKED = 7  # levels of dicts that are searched for weights
# Texts hash by a secret; of numbers anyone can write a thousand that hash alike. An optimizer's
# state has one for each parameter, the labels of ImageNet-22k are 22,000.
_MOST_NUMBER_KEYS = 30_000
_MOST_ALIKE = 20
_LONGEST_KEY = 100  # parts of a tuple that is a key


class Unpickler(pickle._Unpickler):  # the one in Python, whose steps can be counted
    """Unpickles with placeholders, made anew for every pickle, which can set their attributes.

    Args:
      file: where the pickle starts; what follows it is not read.
      storage: gives what a reference to outside of the pickle stands for.
      lenient: see `Names`.
    """

    # Of the base class, which its types do not tell.
    stack: PyTree
    metastack: PyTree
    append: Callable[[PyTree], None]
    pop_mark: Callable[[], PyTree]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]

    def __init__(
        self,
        file: io.BytesIO,
        *,
        storage: Callable[[PyTree], PyTree] | None = None,
        lenient: bool = False,
    ):
        super().__init__(file, encoding="utf-8")
        self._size = file.getbuffer().nbytes
        self._storage = storage
        self._keys = _Keys()
        self._names = Names(lenient=lenient, check_key=self._keys.check)
        self._steps = 0
        self._depths: dict[int, int] = {}  # of tuples by their ids; a stale one is a small number
        self._copied = 0

    def find_class(self, module: str, name: str) -> PyTree:
        return self._names.find(module, name)

    def persistent_load(self, saved_id: PyTree) -> PyTree:
        if self._storage is None:
            raise pickle.UnpicklingError("a reference outside of the tensors' pickle")
        return self._storage(saved_id)

    def load(self) -> PyTree:
        """The object; Refused where the pickle names something that has no placeholder."""
        try:
            result = super().load()
        except Refused:
            raise
        except Exception:
            self._names.check()  # the better error, where an unknown name led to this one
            raise
        self._names.check()
        return result

    # What opcodes do that has a bound here.

    def _copies(self, *values: object) -> None:
        """Counts what a call may copy. Raises UnpicklingError beyond any use."""
        sized = (str, bytes, bytearray, list, tuple, dict, set, frozenset)
        for value in values:
            if isinstance(value, sized):
                self._copied += len(value)
        if self._copied > _MOST_VALUES + 2 * self._size:
            raise pickle.UnpicklingError("it copies the same values again and again")

    def _reduce(self) -> None:
        args, function = self.stack.pop(), self.stack[-1]
        self._copies(*args)
        if function is OrderedDict:
            self.stack[-1] = self._ordered(*args)
        else:
            self.stack[-1] = function(*args)

    def _ordered(self, items: object = ()) -> OrderedDict:
        if isinstance(items, dict):
            return OrderedDict(items)
        result: OrderedDict = OrderedDict()
        if not isinstance(items, list | tuple):
            raise pickle.UnpicklingError(f"a dict of {type(items).__name__}")
        for key, value in items:
            self._keys.check(key)
            result[key] = value
        return result

    def _made(self, kind: type, args: list) -> None:
        if not isinstance(kind, type):
            raise pickle.UnpicklingError("an object of what is no class")
        self._copies(*args)
        self.append(self._ordered(*args) if kind is OrderedDict else kind(*args))

    def _inst(self) -> None:
        kind = self.find_class(*(self.readline()[:-1].decode("ascii") for _ in range(2)))
        self._made(kind, self.pop_mark())

    def _obj(self) -> None:
        kind, *args = self.pop_mark()
        self._made(kind, args)

    def _set_items(self, items: list) -> None:
        found = self.stack[-1]
        if not isinstance(found, dict) or len(items) % 2:
            raise pickle.UnpicklingError("items for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._keys.check(key)
            found[key] = value

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _setitems(self) -> None:
        items = self.pop_mark()
        self._set_items(items)

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _extend(self, items: list) -> None:
        found = self.stack[-1]
        if not isinstance(found, list):
            raise pickle.UnpicklingError("an item for what is no list")
        found.extend(items)

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self.pop_mark())

    def _additems(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise pickle.UnpicklingError("an item for what is no set")
        for item in items:
            self._keys.check(item)
        self.stack[-1].update(items)

    def _frozenset(self) -> None:
        items = self.pop_mark()
        for item in items:
            self._keys.check(item)
        self.append(frozenset(items))

    def _build(self) -> None:
        state, found = self.stack[-1], self.stack[-2]
        if isinstance(found, type | np.ndarray):
            raise pickle.UnpicklingError(f"a state for a {type(found).__name__}")
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts[:2]:
            self._copies(part, part.get("_fields") if isinstance(part, dict) else None)
        cast(Any, super()).load_build()

    def _open(self, step: Callable[[PyTree], None]) -> None:
        # What holds others lies on the stack until it is full.
        if len(self.stack) > _MOST_OPEN or len(self.metastack) > _DEEPEST:
            raise pickle.UnpicklingError("it is nested too deep")
        step(self)

    def _list(self) -> None:
        self._open(cast(Any, pickle._Unpickler).load_empty_list)

    def _empty_dict(self) -> None:
        self._open(cast(Any, pickle._Unpickler).load_empty_dictionary)

    def _mark(self) -> None:
        self._open(cast(Any, pickle._Unpickler).load_mark)

    def _tuple_of(self, items: tuple) -> None:
        depth = 1 + max((self._depths.get(id(i), 1) for i in items if type(i) is tuple), default=0)
        if depth > _DEEPEST:
            raise pickle.UnpicklingError("it is nested too deep")
        self.append(items)
        if depth > 1:
            self._depths[id(items)] = depth

    def _tuple(self) -> None:
        self._tuple_of(tuple(self.pop_mark()))

    def _tuple1(self) -> None:
        self._tuple_of((self.stack.pop(),))

    def _tuple2(self) -> None:
        last, first = self.stack.pop(), self.stack.pop()
        self._tuple_of((first, last))

    def _tuple3(self) -> None:
        last, second, first = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self._tuple_of((first, second, last))

    def _bytearray8(self) -> None:
        # Python's own allocates what is announced before it looks whether it is there.
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def _refused(self) -> None:
        raise pickle.UnpicklingError("an opcode that torch.save does not write")


_OWN: dict[bytes, Callable[[Unpickler], None]] = {
    pickle.REDUCE: Unpickler._reduce,
    pickle.INST: Unpickler._inst,
    pickle.OBJ: Unpickler._obj,
    pickle.SETITEM: Unpickler._setitem,
    pickle.SETITEMS: Unpickler._setitems,
    pickle.DICT: Unpickler._dict,
    pickle.APPEND: Unpickler._append,
    pickle.APPENDS: Unpickler._appends,
    pickle.ADDITEMS: Unpickler._additems,
    pickle.FROZENSET: Unpickler._frozenset,
    pickle.BUILD: Unpickler._build,
    pickle.EMPTY_LIST: Unpickler._list,
    pickle.EMPTY_DICT: Unpickler._empty_dict,
    pickle.MARK: Unpickler._mark,
    pickle.TUPLE: Unpickler._tuple,
    pickle.TUPLE1: Unpickler._tuple1,
    pickle.TUPLE2: Unpickler._tuple2,
    pickle.TUPLE3: Unpickler._tuple3,
    pickle.BYTEARRAY8: Unpickler._bytearray8,
    # Classes by number, from a table of this process; and memory of another one's.
    **dict.fromkeys(
        (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
        Unpickler._refused,
    ),
}


class _Steps(dict[int, Callable[[Unpickler], None]]):
    """The functions of all opcodes, which count themselves."""

    def __init__(self) -> None:
        own = {code[0]: step for code, step in _OWN.items()}
        inherited = cast(Any, pickle._Unpickler).dispatch
        super().__init__({code: _counted(own.get(code, inherited[code])) for code in inherited})

    def __missing__(self, code: int) -> Callable[[Unpickler], None]:
        raise pickle.UnpicklingError(f"invalid load key, {bytes([code])!r}")


def _counted(step: Callable[[Unpickler], None]) -> Callable[[Unpickler], None]:
    def run(unpickler: Unpickler) -> None:
        unpickler._steps += 1
        if unpickler._steps > _MOST_STEPS:
            raise pickle.UnpicklingError(f"more than {_MOST_STEPS} steps to unpickle")
        step(unpickler)

    return run


cast(Any, Unpickler).dispatch = _Steps()


class _Keys:
    """Looks at keys of dicts and items of sets before Python hashes them."""

    def __init__(self) -> None:
        self._numbers = 0
        self._alike: dict[int, list[object]] = {}  # hash → different keys that have it

    def check(self, key: object) -> None:
        """Raises UnpicklingError for a key that takes long to hash, and for too many of numbers."""
        if type(key) is str:
            return
        self._numbers += 1
        if self._numbers > _MOST_NUMBER_KEYS:
            raise pickle.UnpicklingError(f"more than {_MOST_NUMBER_KEYS} keys that are not strings")
        waiting, parts = [key], 0
        while waiting:  # hashing a tuple goes through all that is in it, however deep, each time
            part = waiting.pop()
            parts += 1
            if isinstance(part, tuple) and len(part) + parts <= _LONGEST_KEY:
                waiting += part
            elif not _is_plain(part) or parts > _LONGEST_KEY:
                raise pickle.UnpicklingError(f"a key that is a {type(part).__name__}")
        alike = self._alike.setdefault(hash(key), [])
        if key not in alike:
            alike.append(key)
        if len(alike) > _MOST_ALIKE:
            raise pickle.UnpicklingError("keys that are made to hash alike")


def _is_plain(value: object) -> bool:
    return isinstance(value, str | bytes | int | float | None | Record | type) or callable(value)


def check_size(root: PyTree) -> None:
    """Raises UnpicklingError for a value that is endless for who walks through its first levels.

    A dict of a thousand times the same dict of a thousand times the same one is 5 KB of pickle.

    Args:
      root: what was unpickled.
    """
    done: dict[tuple[int, int], int] = {}

    def size(value: PyTree, depth: int) -> int:
        if isinstance(value, Record):
            value = value.fields
        if not isinstance(value, dict | list | tuple):
            return 1
        if depth == 0:
            return 1 + len(value)
        key = (id(value), depth)
        if key not in done:
            done[key] = 0
            parts = value.values() if isinstance(value, dict) else ()
            total = 1 + len(value) + sum(size(part, depth - 1) for part in parts)
            if total > _MOST_VALUES:
                raise pickle.UnpicklingError("it refers to the same values again and again")
            done[key] = total
        return done[key]

    size(root, _WALKED)
