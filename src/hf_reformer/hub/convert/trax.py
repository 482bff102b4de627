"""Weights of Trax (its `ReformerLM`) as ours, in chunk mode, and a reader of its pickles that runs no code."""

import gzip
import io
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...configuration_reformer import ReformerConfig
from ...models.language_models import ReformerForCausalLM

NOT_IN_WEIGHTS = {"lsh": ("num_hashes", "num_buckets", "lsh_attn_chunk_length"), "local": ("local_attn_chunk_length",)}
MALFORMED = (LookupError, TypeError, ValueError, AttributeError)  # raised where data has another form than expected


def _from_latin1(text: str, encoding: str) -> bytes:
    """How old pickles write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes written as {encoding}")
    return text.encode("latin1")


ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _from_latin1,
    ("collections", "OrderedDict"): dict,
}
for _core in ("core", "_core"):  # numpy 1 and 2
    ALLOWED[f"numpy.{_core}.multiarray", "_reconstruct"] = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    ALLOWED[f"numpy.{_core}.multiarray", "scalar"] = np._core.multiarray.scalar  # type: ignore[attr-defined]
    ALLOWED[f"numpy.{_core}.numeric", "_frombuffer"] = np._core.numeric._frombuffer  # type: ignore[attr-defined]


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(
                f"it holds a `{module}.{name}`, and only numpy arrays in lists, tuples and dictionaries are read. In "
                "Trax, write the weights anew as numpy arrays"
            )
        return ALLOWED[module, name]


def read_pickle(path: str | Path) -> Any:
    """What a pickle holds, compressed by gzip or not; ValueError if not numpy arrays in plain containers alone."""
    data = Path(path).read_bytes()
    try:
        return _ArraysOnly(io.BytesIO(gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data)).load()
    except (pickle.UnpicklingError, zlib.error, EOFError, OSError, *MALFORMED) as error:
        raise ValueError(f"{path} is no pickle of Trax weights that can be read: {error}.") from error


def from_trax(tree: Any, fields: dict[str, Any]) -> tuple[Any, list[str]]:
    """Our causal language model with the weights of Trax's ReformerLM, and what is not the same.

    Args:
        tree: what Trax pickles, a dictionary with "weights", or those weights.
        fields: what the weights don't say, by the names of `ReformerConfig`: `num_hashes`, `num_buckets` (may be
            None), `lsh_attn_chunk_length`, `local_attn_chunk_length`; others if they are not Trax's usual ones.

    Raises:
        ValueError: the tree has another form, or a field is missing or contradicts the shapes.
    """
    weights = tree["weights"] if isinstance(tree, dict) and "weights" in tree else tree
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
    model: Any = ReformerForCausalLM(config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"The weights contradict each other: {error}") from error
    return model.eval(), [
        "Trax shifts its input inside: its logits at a place are ours there, once token 0 is put in front.",
        f"Not in the weights, and taken as usual unless given: hidden_act={config.hidden_act}, layer_norm_eps="
        f"{config.layer_norm_eps}, {config.lsh_num_chunks_before} and {config.local_num_chunks_before} chunks before.",
    ]


def read_tree(weights: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Our state dict, and the config's fields that its shapes tell."""
    state = {"model.embed_tokens.weight": _tensor(weights[1])}
    vocab, hidden = state["model.embed_tokens.weight"].shape
    if not isinstance(weights[3], (tuple, list)):
        raise TypeError("its positions are not axial")
    tables = [_tensor(table)[0] for table in weights[3]]  # Trax has an axis for the batch in front
    state |= {f"model.position_embeddings.weights.{axis}": table for axis, table in enumerate(tables)}
    if len(weights[5]) % 4:
        raise TypeError(f"{len(weights[5])} parts of layers are no multiple of 4")
    layers = [_layer(weights[5][start : start + 4]) for start in range(0, len(weights[5]), 4)]
    for layer, (part, _) in enumerate(layers):
        state |= {f"model.layers.{layer}.{key}": value for key, value in part.items()}
    state["model.norm.weight"], state["model.norm.bias"] = map(_tensor, weights[7])
    state["lm_head.weight"], state["lm_head.bias"] = _tensor(weights[9][0]).T.contiguous(), _tensor(weights[9][1])
    heads, _, size = np.shape(weights[5][0][1][0])
    shape = [table.shape[axis] for axis, table in enumerate(tables)]
    return state, {
        "attn_layers": [kind for _, kind in layers],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "attention_head_size": size,
        "feed_forward_size": state["model.layers.0.feed_forward.up_proj.weight"].shape[0],
        "axial_pos_shape": shape,
        "axial_pos_embds_dim": [table.shape[-1] for table in tables],
        "max_position_embeddings": int(np.prod(shape)),
    }


def _layer(block: Any) -> tuple[dict[str, torch.Tensor], str]:
    """One layer by our names, and its kind: hashed attention has one projection for query and key."""
    norm, attention = block[0][0][0], block[0][1]
    feed_forward = block[2][0][1][2]
    if len(feed_forward) == 4:  # computed in chunks
        feed_forward = feed_forward[2]
    kind = "lsh" if len(attention) < 4 else "local"
    names = ["qk_proj", "v_proj"] if kind == "lsh" else ["q_proj", "k_proj", "v_proj"]
    made = {  # (H, D, head_size) → (H * head_size, D)
        f"attention.{name}.weight": _tensor(part).transpose(1, 2).flatten(0, 1).contiguous()
        for name, part in zip(names, attention, strict=False)
    }
    made["attention.o_proj.weight"] = _tensor(attention[len(names)]).flatten(0, 1).T.contiguous()
    made["attention_norm.weight"], made["attention_norm.bias"] = map(_tensor, norm)
    made["feed_forward_norm.weight"], made["feed_forward_norm.bias"] = map(_tensor, feed_forward[0])
    for name, (weight, bias) in (("up_proj", feed_forward[1]), ("down_proj", feed_forward[4])):
        made[f"feed_forward.{name}.weight"] = _tensor(weight).T.contiguous()
        made[f"feed_forward.{name}.bias"] = _tensor(bias)
    return made, kind


def _tensor(array: Any) -> torch.Tensor:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"an array was expected, found {type(array).__name__}")
    return torch.from_numpy(np.array(array))  # a copy, which may be written to
