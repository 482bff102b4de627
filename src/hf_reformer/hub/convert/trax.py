"""Convert weights of Trax's `ReformerLM` to our model in chunk mode, with a pickle reader that calls no pickled code.

The reader interprets a pickle's instructions itself. Numbers, strings and plain containers are read as is. Arrays are
built only from a shape, the name of a numeric dtype, and bytes that fill the shape exactly. Every other object becomes
an empty placeholder.
"""

import gzip
import math
import pickletools
import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from ...configuration_reformer import ReformerConfig
from ...models.language_models import ReformerForCausalLM

NOT_IN_WEIGHTS = {"lsh": ("num_hashes", "num_buckets", "lsh_attn_chunk_length"), "local": ("local_attn_chunk_length",)}
MALFORMED = (LookupError, TypeError, ValueError, AttributeError)  # raised if data has an unexpected structure
MOST_PARTS = 100_000  # in a tree of weights; a model with 100 layers has about 2,000
MOST_INSTRUCTIONS = 1_000_000  # takes seconds; a checkpoint has a few thousand
MOST_UNPACKED = 20  # times the compressed size: weights hardly compress, zeros in optimizer slots do
NUMBERS = {f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)} - {"f1"} | {"b1"}
VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
VALUES |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
VALUES |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def from_trax(tree: Any, fields: dict[str, Any]) -> tuple[Any, list[str]]:
    """Make our causal language model from the weights of Trax's ReformerLM; also returns the remaining differences.

    Args:
        tree: what Trax pickles, a dictionary with "weights" or (since June 2020) "flat_weights", or those weights.
        fields: fields of `ReformerConfig` that the weights do not determine: `num_hashes`, `num_buckets` (may be
            None), `lsh_attn_chunk_length`, `local_attn_chunk_length`; others if they differ from Trax's defaults.

    Raises:
        ValueError: the tree has an unexpected structure, or a field is unknown, missing or contradicts the shapes.
    """
    held = tree if isinstance(tree, dict) else {}
    weights = next((held[name] for name in ("weights", "flat_weights") if name in held), tree)
    if isinstance(held.get("flat_weights"), int):
        raise ValueError(
            "The pickle holds no weights: Trax of 2021 wrote them to a separate file, `.weights.npy.gz`, which is "
            "not read. In Trax, load the model and pickle `{'weights': model.weights}`."
        )
    try:
        state, shapes = read_tree(weights)
    except (RuntimeError, *MALFORMED) as error:
        raise ValueError(f"These weights are not laid out as a ReformerLM of Trax of 2020 ({error}).") from error
    if unknown := sorted(set(fields) - set(ReformerConfig.__dataclass_fields__)):
        raise ValueError(f"{unknown} are no fields of ReformerConfig.")
    needed = {name for kind in shapes["attn_layers"] for name in NOT_IN_WEIGHTS[kind]}
    if missing := sorted(needed - set(fields)):
        raise ValueError(f"The weights don't tell {missing}. Give these fields; Trax's gin file has them.")
    for name, value in shapes.items():
        given = fields.get(name, value)
        if (list(given) if isinstance(given, tuple) else given) != value:
            raise ValueError(f"`{name}={given}` contradicts the weights: {value}. Leave it out.")
    config = ReformerConfig(
        **{"layer_norm_eps": 1e-6, "eos_token_id": None, **shapes, **fields, "attention_mode": "chunk"}
        | {"is_decoder": True, "tie_word_embeddings": False}
    )
    with torch.device("meta"):  # inconsistent weights may imply any size
        model: Any = ReformerForCausalLM(config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"The weights contradict each other: {error}") from error
    return model.eval(), [
        "Trax shifts its input internally: its logits at a position equal ours once token 0 is put in front.",
        f"Not in the weights, and set to defaults unless given: hidden_act={config.hidden_act}, layer_norm_eps="
        f"{config.layer_norm_eps}, {config.lsh_num_chunks_before} and {config.local_num_chunks_before} chunks before.",
    ]


def read_tree(weights: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Make our state dict; also returns the config fields determined by its shapes.

    Only the arrays are used. Their order is the same in a tree and in the flat list of later versions: embeddings,
    axial positions, layers (each a norm, attention, a norm, two dense layers), a norm, the head.
    """
    waiting = _tensors(weights)[::-1]

    def take(*dims: int) -> list[torch.Tensor]:
        found = [waiting.pop() for _ in dims]
        if [x.dim() for x in found] != list(dims):
            raise TypeError(f"found arrays of {[x.dim() for x in found]} dimensions instead of {list(dims)}")
        return found

    (embeddings,) = take(2)
    state, (vocab, hidden) = {"model.embed_tokens.weight": embeddings}, embeddings.shape
    tables: list[torch.Tensor] = []
    layers: list[tuple[str, torch.Size]] = []
    while waiting and waiting[-1].dim() >= 3:
        tables.append(waiting.pop()[0])  # Trax has a leading batch axis
    if len(tables) < 2:
        raise TypeError("its positions are not axial")
    state |= {f"model.position_embeddings.weights.{axis}": table for axis, table in enumerate(tables)}
    while len(waiting) > 4:
        norm = take(1, 1)
        attention = []
        while waiting[-1].dim() == 3:
            attention += take(3)
        part, kind = _layer(norm, attention, take(1, 1), take(2, 1), take(2, 1))
        state |= {f"model.layers.{len(layers)}.{key}": value for key, value in part.items()}
        layers.append((kind, attention[0].shape))
    state["model.norm.weight"], state["model.norm.bias"] = take(1, 1)
    head, state["lm_head.bias"] = take(2, 1)
    state["lm_head.weight"] = head.T.contiguous()
    heads, _, size = layers[0][1]
    shape = [table.shape[axis] for axis, table in enumerate(tables)]
    return state, {
        "attn_layers": [kind for kind, _ in layers],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "attention_head_size": size,
        "feed_forward_size": state["model.layers.0.feed_forward.up_proj.weight"].shape[0],
        "axial_pos_shape": shape,
        "axial_pos_embds_dim": [table.shape[-1] for table in tables],
        "max_position_embeddings": math.prod(shape),
    }


def _layer(norm: list, attention: list, second_norm: list, up: list, down: list) -> tuple[dict, str]:
    """Convert one layer to our names; also returns its kind: LSH layers have a single query/key projection."""
    if len(attention) not in (3, 4):
        raise TypeError(f"attention has {len(attention)} arrays, where lsh has 3 and local attention 4")
    kind = "lsh" if len(attention) == 3 else "local"
    names = ["qk_proj", "v_proj"] if kind == "lsh" else ["q_proj", "k_proj", "v_proj"]
    made = {  # (H, D, head_size) → (H * head_size, D)
        f"attention.{name}.weight": part.transpose(1, 2).flatten(0, 1).contiguous()
        for name, part in zip(names, attention, strict=False)
    }
    made["attention.o_proj.weight"] = attention[-1].flatten(0, 1).T.contiguous()
    made["attention_norm.weight"], made["attention_norm.bias"] = norm
    made["feed_forward_norm.weight"], made["feed_forward_norm.bias"] = second_norm
    for name, (weight, bias) in (("up_proj", up), ("down_proj", down)):
        made[f"feed_forward.{name}.weight"] = weight.T.contiguous()
        made[f"feed_forward.{name}.bias"] = bias
    return made, kind


def _tensors(tree: Any) -> list[torch.Tensor]:
    """Copy the arrays in a tree of lists and tuples to tensors, in order."""
    arrays: list[np.ndarray] = []
    waiting, seen = [tree], 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if isinstance(node, (list, tuple)):
            if seen + len(waiting) + len(node) > MOST_PARTS:
                raise TypeError(f"it has more than {MOST_PARTS:,} parts")
            waiting += reversed(node)
            continue
        array = node.array if isinstance(node, PickledArray) else node
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            kind = f"{array.dtype} array" if isinstance(array, np.ndarray) else type(array).__name__
            raise TypeError(f"an array of floats was expected, found {node if type(node) is Foreign else kind}")
        arrays.append(array)
    alone = {id(array): array.nbytes for array in arrays}
    if sum(array.nbytes for array in arrays) > 2**28 + 20 * sum(alone.values()):
        raise TypeError("it repeats the same arrays, and copies would fill the memory")
    return [torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="))) for array in arrays]


# --- reading a pickle


class Foreign:
    """A placeholder for an object or function that is not read; `str` gives its name."""

    def __init__(self, name: str):
        self.name = name

    def __str__(self) -> str:
        return f"a `{ascii(self.name)[1:-1][:80]}`"


class PickledType(Foreign):
    """A numeric NumPy dtype: its code and byte order."""

    def __init__(self, code: Any):
        super().__init__("numpy.dtype")
        self.code, self.order = code, "="

    def build(self, state: Any) -> None:
        """Set the byte order from NumPy's pickled state; reject states of types other than plain numbers."""
        plain = isinstance(state, tuple) and len(state) == 8 and state[2:7] == (None, None, None, -1, -1)
        if not plain or state[1] not in ("<", ">", "=", "|") or state[7] != 0:
            raise UnpicklingError("it holds an array with fields, objects or alignment, and only numbers are read")
        self.order = state[1]

    def dtype(self) -> np.dtype:
        if not isinstance(self.code, str) or self.code not in NUMBERS:
            code = ascii(self.code)[:20] if isinstance(self.code, str) else type(self.code).__name__
            raise UnpicklingError(f"it holds an array of the type {code}, and only numbers are read")
        return np.dtype(self.code if self.order == "|" else self.order + self.code)


class PickledArray(Foreign):
    """A numeric array: `array`, None until its values have been read."""

    def __init__(self) -> None:
        super().__init__("numpy.ndarray")
        self.array: np.ndarray | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.array, dtype=dtype)

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise UnpicklingError("an array in it has no shape, type and values")
        shape, kind, fortran, values = state[-4:]
        self.fill(shape, kind, values, "F" if fortran else "C")

    def fill(self, shape: Any, kind: Any, values: Any, order: Any) -> "PickledArray":
        """Validate shape, type and order, then read the values."""
        if not isinstance(kind, PickledType):
            raise UnpicklingError("an array in it has no type of numbers")
        dtype = kind.dtype()
        if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(n) is int for n in shape):
            raise UnpicklingError("the shape of an array in it is no tuple of up to 8 whole numbers")
        if isinstance(values, str):
            values = values.encode("latin1")  # bytes pickled by Python 2
        if not isinstance(values, (bytes, bytearray)) or order not in ("C", "F"):
            raise UnpicklingError(f"the values of an array in it are {type(values).__name__}, and not plain bytes")
        if not all(0 <= n < 2**31 for n in shape) or math.prod(shape) * dtype.itemsize != len(values):
            raise UnpicklingError(
                f"an array in it has {len(values)} bytes of values, and its shape and type ask for another number"
            )
        self.array = np.ndarray(shape, dtype, bytes(values), order=order)
        return self

    def transpose(self, axes: Any) -> "PickledArray":
        if not isinstance(axes, tuple) or not all(type(axis) is int for axis in axes):
            raise UnpicklingError("the axes of an array in it are no whole numbers")
        self.array = self.array.transpose(axes)
        return self


class _Bounded:
    """A stream with a limit on the number of bytes read, for `pickletools.genops`."""

    def __init__(self, stream: Any, limit: int):
        self.stream, self.limit, self.left = stream, limit, limit

    def read(self, size: int) -> bytes:
        return self._count(b"" if size > self.left else self.stream.read(size), size)

    def readline(self) -> bytes:
        line = self.stream.readline(self.left + 1)
        return self._count(line, len(line))

    def _count(self, data: bytes, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise UnpicklingError(f"it unpacks to more than {self.limit:,} bytes, which is far more than weights do")
        return data


def read_pickle(path: str | Path) -> Any:
    """Read a pickle, gzipped or not, with a `PickledArray` for every array; nothing in it is called.

    Raises:
        ValueError: it is not a pickle, is truncated or too large, or contains non-numeric arrays.
    """
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        limit = max(2**26, MOST_UNPACKED * size) if compressed else size
        try:
            return _interpret(_Bounded(gzip.open(file) if compressed else file, limit))
        except (UnpicklingError, zlib.error, EOFError, OSError, MemoryError, OverflowError, *MALFORMED) as error:
            reason = "there is not enough memory" if isinstance(error, MemoryError) else error
            raise ValueError(f"{path} is no pickle of Trax weights that can be read: {reason}.") from error


def _interpret(stream: Any) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for count, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MOST_INSTRUCTIONS:
            raise UnpicklingError(f"it has more than {MOST_INSTRUCTIONS:,} instructions, and weights need thousands")
        name = instruction.name
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        else:
            match name:
                case "PROTO" | "FRAME":
                    pass
                case "MARK":
                    marks.append(len(stack))
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    pop_mark()
                case "DUP":
                    stack.append(stack[-1])
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_SET":
                    stack.append(Foreign("set"))
                case "LIST":
                    stack.append(pop_mark())
                case "TUPLE":
                    stack.append(tuple(pop_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    size = int(name[-1])
                    stack[-size:] = [tuple(stack[-size:])]
                case "DICT":
                    stack.append(_put({}, pop_mark()))
                case "FROZENSET":
                    pop_mark()
                    stack.append(Foreign("frozenset"))
                case "APPEND":
                    item = stack.pop()
                    _extend(stack[-1], [item])
                case "APPENDS" | "ADDITEMS":
                    items = pop_mark()
                    _extend(stack[-1], items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _put(stack[-1], [key, value])
                case "SETITEMS":
                    items = pop_mark()
                    _put(stack[-1], items)
                case "GLOBAL":
                    stack.append(Foreign(argument.replace(" ", ".")))
                case "STACK_GLOBAL":
                    own, module = stack.pop(), stack.pop()
                    if not isinstance(own, str) or not isinstance(module, str):
                        raise UnpicklingError("an object in it has no name")
                    stack.append(Foreign(f"{module}.{own}"))
                case "INST":
                    pop_mark()
                    stack.append(Foreign(argument.replace(" ", ".")))
                case "OBJ":
                    called, *_ = pop_mark()
                    stack.append(_made(called, None))
                case "REDUCE" | "NEWOBJ":
                    arguments, called = stack.pop(), stack.pop()
                    stack.append(_made(called, arguments))
                case "NEWOBJ_EX":
                    _, _, called = stack.pop(), stack.pop(), stack.pop()
                    stack.append(_made(called, None))
                case "BUILD":
                    state = stack.pop()
                    if isinstance(stack[-1], (PickledArray, PickledType)):
                        stack[-1].build(state)
                case "STOP":
                    return stack.pop()
                case _:
                    raise UnpicklingError(f"it has the instruction {name}, which refers to something outside of it")
    raise EOFError("it ends before it is complete")


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target += items
    elif not isinstance(target, Foreign):
        raise UnpicklingError(f"it appends to a {type(target).__name__}")


def _put(target: Any, items: list[Any]) -> Any:
    """Add alternating keys and values to a dictionary; only string keys are kept, as others can be slow to hash."""
    if isinstance(target, dict):
        target.update((key, value) for key, value in zip(items[::2], items[1::2], strict=True) if type(key) is str)
    elif not isinstance(target, Foreign):
        raise UnpicklingError(f"it sets items of a {type(target).__name__}")
    return target


def _made(function: Any, arguments: Any) -> Any:
    """Emulate a call of a function or class that NumPy uses to pickle arrays; return a placeholder for any other."""
    if type(function) is not Foreign:
        raise UnpicklingError(f"it calls a {type(function).__name__}")
    given = arguments if isinstance(arguments, tuple) else ()
    name = function.name.replace("numpy.core.", "numpy._core.")  # NumPy 1 and 2
    match name, len(given):
        case "numpy._core.multiarray._reconstruct", 3 if str(given[0]) == str(Foreign("numpy.ndarray")):
            return PickledArray()
        case "numpy.dtype", 1 | 2 | 3:
            return PickledType(given[0])
        case "numpy._core.multiarray.scalar", 2:
            return PickledArray().fill((), given[0], given[1], "C")
        case "numpy._core.numeric._frombuffer", 4:
            return PickledArray().fill(given[2], given[1], given[0], given[3])
        case "numpy._core.numeric._frombuffer", 5:  # the axes are not in memory order
            return PickledArray().fill(given[2], given[1], given[0], "C").transpose(given[4])
        case "_codecs.encode", 2 if given[1] == "latin1" and isinstance(given[0], str):
            return given[0].encode("latin1")  # bytes before protocol 3
        case "__builtin__.bytes" | "builtins.bytes", 0:
            return b""
        case "collections.OrderedDict", 0:
            return {}
        case "collections.OrderedDict", 1 if isinstance(given[0], list):  # protocols 0 and 1
            pairs = [pair for pair in given[0] if isinstance(pair, (list, tuple)) and len(pair) == 2]
            return _put({}, [part for pair in pairs for part in pair])
        case "copyreg._reconstructor" | "copy_reg._reconstructor", 3:
            return Foreign(given[0].name if type(given[0]) is Foreign else name)
    return Foreign(function.name)
