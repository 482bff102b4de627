"""Convert weights of reformer-pytorch's `ReformerLM` to our model in chunk mode."""

import re
from typing import Any

import torch
from transformers.activations import ACT2FN

from ...configuration_reformer import ReformerConfig
from ...models.language_models import ReformerForCausalLM, ReformerForMaskedLM

State = dict[str, torch.Tensor]
MOST_PARAMETERS = 2**28  # plus 20 times those in the file, for position tables and matrix products
LAYER = "reformer.layers.blocks.{}."
NEEDED = ("causal", "bucket_size", "n_hashes")  # plus what `sizes` cannot infer
WITHOUT_EFFECT = ["ff_chunks", "attn_chunks", "reverse_thres", "pkm_num_keys", "axial_position_shape", "ff_mult"]
WITHOUT_EFFECT += ["random_rotations_per_head"]
OPTIONAL: dict[str, Any] = {"ff_activation": "gelu", "use_full_attn": False, "full_attn_thres": 0}
OPTIONAL |= dict.fromkeys(["lsh_dropout", "ff_dropout", "post_attn_dropout", "layer_dropout"], 0.0)
IN_SHAPES = ["num_tokens", "dim", "depth", "heads", "dim_head", "max_seq_len", "emb_dim", "weight_tie"]
IN_SHAPES += ["one_value_head", "weight_tie_embedding", "fixed_position_emb", "absolute_position_emb"]
IN_SHAPES += ["axial_position_emb"]
NO_COUNTERPART = {  # in our chunk mode
    "use_scale_norm": "its norm divides by the vector's length; ours is a LayerNorm with mean and bias",
    "use_rezero": "its branches have no norm in front; ours always have one",
    "num_mem_kv": "its attention reads extra learned keys; ours reads tokens alone",
    "pkm_layers": "its product-key memory layers have no equivalent here",
    "n_local_attn_heads": "its layers mix local and LSH heads; ours are local or LSH as a whole",
    "return_embeddings": "its model has no head and normalizes the mean of both streams; ours keeps them separate",
    "ff_glu": "its feed-forward multiplies two projections; ours has one",
}
TRACES = {  # in the parameter names
    "use_scale_norm": r"\.norm\.g$",
    "use_rezero": r"\.[fg]\.net\.g$",
    "num_mem_kv": r"\.mem_kv$",
    "pkm_layers": r"\.to_queries\.weight$",
}


def from_reformer_pytorch(state: State, arguments: dict[str, Any]) -> tuple[Any, list[str]]:
    """Make our model from the weights of a `ReformerLM`; also returns the remaining differences.

    Args:
        state: its `state_dict()`; wrapper prefixes (`net.`, `module.`) are ignored.
        arguments: its constructor arguments. Those determined by the shapes may be omitted, and are checked if given.

    Raises:
        ValueError: an argument is missing, contradicts the weights, or has no counterpart; the message says which.
    """
    names = [key for key in state if key.endswith("token_emb.weight")]
    if len(names) != 1:
        raise ValueError(
            f"`token_emb.weight` occurs {len(names)} times in these weights, once in those of a ReformerLM. Neither "
            "the bare Reformer nor ReformerEncDec of reformer-pytorch can be converted."
        )
    prefix = names[0].removesuffix("token_emb.weight")
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    state = {key: value for key, value in state.items() if ".irrev_blocks." not in key}  # duplicates of the others
    check_arguments(state, arguments)
    given = {**OPTIONAL, **arguments, **sizes(state, arguments)}
    config = make_config(given)
    with torch.device("meta"):
        model: Any = (ReformerForCausalLM if given["causal"] else ReformerForMaskedLM)(config)
    if model.num_parameters() > MOST_PARAMETERS + 20 * sum(x.numel() for x in state.values()):
        raise ValueError(
            f"These weights ask for a model of {model.num_parameters():,} parameters, far more than they hold. Check "
            "`max_seq_len` and the shapes."
        )
    dtype = state["token_emb.weight"].dtype
    weights = {key: value.double() for key, value in state.items()}
    converted, left = convert_weights(weights, given, config)
    try:
        model.load_state_dict({key: value.to(dtype).contiguous() for key, value in converted.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"The weights contradict each other: {error}") from error
    return model.to(dtype).eval(), notes(given, weights, left)


def check_arguments(state: State, arguments: dict[str, Any]) -> None:
    """Raise ValueError for arguments that are unknown, missing or have no counterpart."""
    known = {*NEEDED, *WITHOUT_EFFECT, *OPTIONAL, *IN_SHAPES, *NO_COUNTERPART}
    if unknown := sorted(set(arguments) - known):
        raise ValueError(f"{unknown} are no arguments of ReformerLM. Known are {sorted(known)}.")
    used = {name for name in NO_COUNTERPART if arguments.get(name)}
    used |= {name for name, pattern in TRACES.items() if any(re.search(pattern, key) for key in state)}
    if not any(key.startswith("out.1.") for key in state):
        used.add("return_embeddings")
    if not used:
        up, down = (state[LAYER.format(0) + f"g.net.fn.fn.{name}.weight"] for name in ("w1", "w2"))
        used |= {"ff_glu"} if up.shape[0] != down.shape[1] else set()
    for name in sorted(used):
        raise ValueError(f"`{name}` has no counterpart in our chunk mode: {NO_COUNTERPART[name]}.")
    if missing := [name for name in NEEDED if name not in arguments]:
        raise ValueError(f"{missing} cannot be read from the weights. Give what ReformerLM was made with.")
    if arguments.get("ff_activation", "gelu") not in ACT2FN:
        raise ValueError(f"`ff_activation={arguments['ff_activation']!r}` must be a name, such as 'gelu' or 'relu'.")


def sizes(state: State, arguments: dict[str, Any]) -> dict[str, Any]:
    """Infer sizes from shapes, then arguments. Raises ValueError if one is missing or contradicts the shapes."""
    first = LAYER.format(0)
    query = state[first + "f.net.fn.toqk.weight"]
    kinds = {"pos_emb.emb.weight": "absolute", "pos_emb.weights.0": "axial", "pos_emb.inv_freq": "fixed"}
    found: dict[str, Any] = {
        "dim": query.shape[1],
        "depth": depth(state),
        "ff_size": state[first + "g.net.fn.fn.w1.weight"].shape[0],
        "weight_tie_embedding": "out.1.tensor" in state,
        "positions": next((kind for key, kind in kinds.items() if key in state), "rotary"),
    }
    found["num_tokens"], found["emb_dim"] = state["token_emb.weight"].shape
    if found["positions"] == "absolute":
        found["max_seq_len"] = state["pos_emb.emb.weight"].shape[0]
    if "layer_pos_emb.inv_freq" in state:
        found["dim_head"] = 2 * state["layer_pos_emb.inv_freq"].shape[0]
    elif "dim_head" not in arguments and "heads" in arguments:
        found["dim_head"] = query.shape[0] // arguments["heads"]
    for name in ("dim_head", "max_seq_len"):
        if found.setdefault(name, arguments.get(name)) is None:
            raise ValueError(f"`{name}` cannot be read from these weights. Give it: it was an argument of ReformerLM.")
    found["heads"] = query.shape[0] // found["dim_head"]
    for name, value in found.items():
        if arguments.get(name, value) != value:
            raise ValueError(f"`{name}={arguments[name]}` contradicts the weights, which say {value}. Leave it out.")
    if found["heads"] * found["dim_head"] != query.shape[0]:
        raise ValueError(f"`dim_head={found['dim_head']}` does not divide the width {query.shape[0]} of the queries.")
    return found


def depth(state: State) -> int:
    """Return the number of layers. Raises ValueError unless they are numbered without gaps."""
    blocks = {found[1] for key in state if (found := re.match(r"reformer\.layers\.blocks\.(\d{1,9})\.", key))}
    if absent := {str(i) for i in range(len(blocks))} - blocks:
        raise ValueError(f"Layer {min(absent, key=int)} is missing, while others have higher numbers.")
    return len(blocks)


def make_config(given: dict[str, Any]) -> ReformerConfig:
    length, bucket = given["max_seq_len"], given["bucket_size"]
    rotary = given["positions"] == "rotary" and not given["use_full_attn"]  # ignored by their exact attention
    return ReformerConfig(
        attention_mode="chunk",
        attn_layers=["lsh"] * given["depth"],
        vocab_size=given["num_tokens"],
        hidden_size=given["dim"],
        num_attention_heads=given["heads"],
        attention_head_size=given["dim_head"],
        feed_forward_size=given["ff_size"],
        hidden_act=given["ff_activation"],
        max_position_embeddings=length,
        position_embedding_type="rotary" if rotary else "learned",
        lsh_attn_chunk_length=length if given["use_full_attn"] else bucket,
        num_hashes=given["n_hashes"],
        num_buckets=max(2, length // (2 * bucket) * 2),
        lsh_attention_probs_dropout_prob=given["lsh_dropout"],
        hidden_dropout_prob=given["ff_dropout"],
        layer_norm_eps=1e-5,
        is_decoder=bool(given["causal"]),
        eos_token_id=None,
    )


def convert_weights(weights: State, given: dict[str, Any], config: ReformerConfig) -> tuple[State, float]:
    """Make our state dict; also returns the largest share of a `to_out.bias` that could not be preserved."""
    into = weights.get("to_model_dim.weight", torch.eye(given["dim"], dtype=torch.float64))
    shift = weights.get("to_model_dim.bias", torch.zeros(given["dim"], dtype=torch.float64))
    made = {"model.embed_tokens.weight": weights["token_emb.weight"] @ into.T + shift}
    if config.position_embedding_type == "learned":
        made["model.position_embeddings.weight"] = position_table(weights, given) @ into.T
    left = 0.0
    for layer in range(given["depth"]):
        branches, lost = convert_layer(weights, layer, given, config.position_embedding_type == "rotary")
        made |= {f"model.layers.{layer}.{key}": value for key, value in branches.items()}
        left = max(left, lost)
    made["model.norm.weight"] = weights["norm.weight"].repeat(2)
    made["model.norm.bias"] = weights["norm.bias"].repeat(2)
    if given["weight_tie_embedding"]:
        head = torch.nn.functional.normalize(weights["out.1.tensor"], dim=-1)  # (V, D)
        bias = head.new_zeros(len(head))
    else:
        head, bias = weights["out.1.weight"], weights["out.1.bias"]
    if "out.0.weight" in weights:  # merges their two projections
        head, bias = head @ weights["out.0.weight"], bias + head @ weights["out.0.bias"]
    made["lm_head.weight"], made["lm_head.bias"] = head.repeat(1, 2) / 2, bias
    return made, left


def position_table(weights: State, given: dict[str, Any]) -> torch.Tensor:
    """Return the position embeddings, (max_seq_len, emb_dim)."""
    length, kind = given["max_seq_len"], given["positions"]
    if kind == "absolute":
        return weights["pos_emb.emb.weight"]
    if kind == "fixed":
        angles = torch.arange(length).double()[:, None] * weights["pos_emb.inv_freq"]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
    if kind == "axial":
        tables = [weights[f"pos_emb.weights.{axis}"] for axis in range(sum("pos_emb.weights." in k for k in weights))]
        table = sum(tables[1:], tables[0]).flatten(0, -2)  # summed over the axes; ours are concatenated
        if len(table) < length:
            raise ValueError(f"`max_seq_len={length}` is more than the {len(table)} positions of the axial tables.")
        return table[:length]
    return torch.zeros(length, given["emb_dim"], dtype=torch.float64)


def convert_layer(weights: State, layer: int, given: dict[str, Any], rotary: bool) -> tuple[State, float]:
    """Convert one layer to our names; also returns the share of its output bias that could not be preserved.

    Our output projection has no bias. Instead, the norm's bias and the query and value projections are changed so that
    attention's output includes it. A normalized vector n sums to 0, so adding c/κ · (1/scale)ᵀ to a projection's
    matrix adds a constant c for every token: (1/scale)ᵀ (scale * n + bias) = Σ bias/scale = κ. The norm's bias is
    first shifted along `scale` until κ equals the norm's width; the same technique preserves the projections' outputs.
    Attention weights sum to 1, so a constant in all values is output multiplied by `out`. If `out` is singular, part
    of the bias cannot be produced by any constant.
    """
    heads, size = given["heads"], given["dim_head"]
    f, g = (LAYER.format(layer) + f"{branch}.net." for branch in "fg")
    query = weights[f + "fn.toqk.weight"] / size**0.5  # ours does not scale scores, as keys are normalized
    if rotary:  # they rotate adjacent pairs, ours are half a head apart
        order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])
        query = query.unflatten(0, (heads, size))[:, order].flatten(0, 1)
    value = weights[f + "fn.tov.weight"]
    value = value.repeat(heads * size // len(value), 1)  # one_value_head
    out, out_bias = weights[f + "fn.to_out.weight"], weights[f + "fn.to_out.bias"]
    scale, bias = weights[f + "norm.weight"], weights[f + "norm.bias"]
    if not scale.all():
        raise ValueError("A norm before attention has a weight of exactly 0, so that `to_out.bias` cannot be kept.")
    width, inverse = len(scale), 1 / scale
    moved = scale * (1 - (bias * inverse).sum() / width)
    constant = torch.linalg.lstsq(out, out_bias[:, None], driver="gelsd").solution[:, 0]
    made = {
        "attention_norm.weight": scale,
        "attention_norm.bias": bias + moved,
        "attention.qk_proj.weight": query - torch.outer(query @ moved, inverse) / width,
        "attention.v_proj.weight": value + torch.outer(constant - value @ moved, inverse) / width,
        "attention.o_proj.weight": out,
    }
    names = {"feed_forward_norm": "norm", "feed_forward.up_proj": "fn.fn.w1", "feed_forward.down_proj": "fn.fn.w2"}
    for ours, theirs in names.items():
        made |= {f"{ours}.{name}": weights[f"{g}{theirs}.{name}"] for name in ("weight", "bias")}
    left = (out @ constant - out_bias).norm() / out_bias.norm().clamp(min=1e-30)
    return made, left.item()


def notes(given: dict[str, Any], weights: State, left: float) -> list[str]:
    """List the remaining differences of the converted model, one line each."""
    lines = [
        "The head normalizes both streams together, not their mean: apart from a bias that all tokens share, logits "
        "are multiplied by a positive number for each token. The most likely token almost always stays the same; "
        "a little training adapts the head.",
        f"Hash rotations differ in any case. `num_buckets` is fixed at the number for {given['max_seq_len']} tokens; "
        "theirs is length / bucket_size: pass `num_buckets=` in a call to match it.",
        "Keys are normalized with 1e-6 under the square root; theirs with none.",
        "Padding is hashed into separate buckets, and inputs of any length are padded internally.",
    ]
    if left > 1e-6:
        lines.append(f"`to_out.bias` is kept but for {left:.1%}: attention's output does not reach every direction.")
    kind = given["positions"]
    if kind == "rotary" and given["use_full_attn"]:
        lines.append("With `use_full_attn` theirs ignores rotary positions: the model has a table of zeros instead.")
    elif kind in ("axial", "fixed"):
        lines.append(f"The {kind} positions became a learned table of {given['max_seq_len']} rows with their values.")
    if given["emb_dim"] != given["dim"]:
        lines.append("The projections from and to `emb_dim` were multiplied into the embeddings and the head.")
    if given["weight_tie_embedding"]:
        lines.append("The head has a weight of its own, the normalized embeddings: they are no longer tied.")
    tied = [weights[LAYER.format(i) + "f.net.fn.toqk.weight"] for i in range(given["depth"])]
    if len(tied) > 1 and all(torch.equal(tied[0], other) for other in tied[1:]):
        lines.append("Layers that shared their weights (`weight_tie`) have copies of their own.")
    bucket, most = given["bucket_size"], given["full_attn_thres"]
    if most and most != bucket:
        lines.append(f"Attention is exact up to {bucket} tokens; theirs was up to `full_attn_thres={most}`.")
    if most and kind == "rotary" and not given["use_full_attn"]:
        lines.append("Up to `full_attn_thres` tokens theirs ignores rotary positions; ours never does.")
    if any(given[name] for name in ("post_attn_dropout", "layer_dropout")):
        lines.append("`post_attn_dropout` and `layer_dropout` are left out; ours drops after every branch.")
    if given["ff_dropout"]:
        lines.append("`ff_dropout` became `hidden_dropout_prob`, which also drops embeddings and branches' outputs.")
    return lines
