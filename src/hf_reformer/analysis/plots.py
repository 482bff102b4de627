"""Plots of LSH attention: buckets, visible pairs, attention weights, attention mass.

The data come from the model's own forward pass (`view_layer`, or `output_attentions`). Every function draws into the
given Axes, or a new figure, and returns the Axes; nothing is shown or saved.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..ops.coverage import coverage_target
from ..ops.gather_attention import AttentionWeights
from .found import AttentionFound
from .lsh_stats import (
    LayerView,
    as_lists,
    attention_mass,
    bucket_sizes,
    buckets_of,
    check_index,
    round_agreement,
    visible_pairs,
)

SIDE = 256  # pixels of a plot of pairs; longer sequences are drawn in blocks of tokens
MAX_LABELS = 64  # number of tokens whose text is legible along an axis


def plot_buckets(view: LayerView, hash_round: int = 0, row: int = 0, head: int = 0, ax: Any = None) -> Any:
    """Plot the bucket of every real token over its position, in one hash round."""
    buckets = buckets_of(view)
    batch, heads, rounds, _ = buckets.shape
    check_index(row=(row, batch), head=(head, heads), hash_round=(hash_round, rounds))
    real = view.mask[row].nonzero().squeeze(-1)
    ax = _axes(ax)
    ax.scatter(real.cpu(), buckets[row, head, hash_round, real].cpu(), s=8, linewidths=0)
    ax.set(xlabel="position", ylabel="bucket", title=f"head {head}, hash {hash_round + 1}")
    ax.set_ylim(-1, view.num_buckets)
    ax.locator_params("y", integer=True)
    return ax


def plot_pairs(view: LayerView, row: int = 0, head: int = 0, ax: Any = None, side: int = SIDE) -> Any:
    """Plot which tokens attend to which, each visible pair in the color of the first sort order that contains it.

    If the input is longer than `side`, each pixel represents a block of tokens, in the color of the first order that
    contains any of its pairs.
    """
    query, key, order = visible_pairs(view, row, head)
    length, count = view.mask.shape[1], len(view.names)
    step = -(-length // side)
    size = -(-length // step)
    image = order.new_full((size * size,), count)  # count: not visible
    image.scatter_reduce_(0, query // step * size + key // step, order, "amin")
    ax = _axes(ax)

    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colors = [_color(name) for name in view.names]
    image = image.view(size, size).cpu()
    _show(ax, image, step, step, cmap=ListedColormap([*colors, "white"]), vmin=0, vmax=count)
    patches = [Patch(color=color, label=name) for color, name in zip(colors, view.names, strict=True)]
    ax.legend(handles=patches, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    ax.set_title(f"which tokens attend to which, head {head}")
    return ax


def plot_attention(
    attention: AttentionWeights,
    row: int = 0,
    head: int = 0,
    tokens: Sequence[str] | None = None,
    mask: torch.Tensor | None = None,
    ax: Any = None,
    side: int = SIDE,
) -> Any:
    """Plot the attention weights of a head, one row of pixels per query token.

    Args:
        attention, mask: as for `attention_mass`.
        tokens: texts of the tokens, as labels for both axes; only for short inputs.
        side: if there are more tokens, each pixel represents a block: the share of attention that the tokens of its
            row give to those of its column, so that every row still sums to 1.
    """
    image, steps = attention_image(attention, row, head, mask, side)
    columns = as_lists(attention)[2]
    if tokens is not None and (len(tokens) != columns or columns > MAX_LABELS):
        raise ValueError(
            f"`tokens` holds {len(tokens)} texts for {columns} tokens. Give one for each of at most {MAX_LABELS}, "
            "or leave them out."
        )
    ax = _axes(ax)

    from matplotlib.colors import PowerNorm

    norm = PowerNorm(0.5, 0, max(float(image.detach().max()), 1e-9))
    shown = _show(ax, image.detach().float().cpu(), *steps, cmap="Blues", norm=norm)
    if tokens is not None:
        first = columns - len(image)
        ax.set_xticks(range(columns), tokens, rotation=90)
        ax.set_yticks(range(len(image)), tokens[first:])
    ax.figure.colorbar(shown, ax=ax, label="weight")
    ax.set_title(f"attention, head {head}")
    return ax


def attention_image(
    attention: AttentionWeights, row: int = 0, head: int = 0, mask: torch.Tensor | None = None, side: int = SIDE
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Return a head's weights in at most `side` rows and columns, and the number of tokens per row and column."""
    tokens, weights, columns = as_lists(attention, mask)
    check_index(row=(row, len(tokens)), head=(head, tokens.shape[1]))
    tokens, weights = tokens[row, head].clamp(min=0), weights[row, head]  # (T, K)
    steps = -(-len(tokens) // side), -(-columns // side)
    query = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens) // steps[0]
    size = -(-len(tokens) // steps[0]), -(-columns // steps[1])
    image = weights.new_zeros(size).index_put((query, tokens // steps[1]), weights, accumulate=True)
    return image / image.detach().sum(-1, keepdim=True).round().clamp(min=1), steps


def plot_attention_mass(
    attention: AttentionWeights,
    row: int = 0,
    mask: torch.Tensor | None = None,
    ax: Any = None,
    causal: bool | None = None,
) -> Any:
    """Plot the share of attention that every token receives, one line per head.

    Args:
        attention, mask: as for `attention_mass`.
        causal: whether the layer is causal. If given, a dashed line shows the mass under uniform attention, the target
            of the coverage loss. Not supported for packed samples.
    """
    mass = attention_mass(attention, mask)
    check_index(row=(row, len(mass)))
    ax = _axes(ax)
    for head, shares in enumerate(mass[row].detach().float().cpu()):
        ax.plot(shares, label=f"head {head}", linewidth=1)
    if causal is not None:
        real = torch.ones_like(mass[:, 0], dtype=torch.bool) if mask is None else mask.bool()
        target = coverage_target(real, (real.cumsum(-1) - 1).clamp(min=0), causal=causal).target[row]
        ax.plot(target.cpu(), label="evenly spread", color="black", linestyle="--", linewidth=1)
    ax.set(xlabel="position", ylabel="share of all attention", title="attention received")
    ax.legend(frameon=False)
    return ax


def plot_bucket_sizes(view: LayerView, ax: Any = None) -> Any:
    """Plot a histogram of bucket sizes over all sequences, heads and rounds; the dashed line marks an even share."""
    sizes = bucket_sizes(view).double()
    even = view.mask.sum(-1).clamp(min=1)[:, None, None, None] / view.num_buckets
    ax = _axes(ax)
    ax.hist((sizes / even).flatten().cpu(), bins=30)
    ax.axvline(1, color="black", linestyle="--", label="even share")
    ax.set(xlabel="tokens in a bucket / even share", ylabel="buckets", title="how full buckets are")
    ax.legend(frameon=False)
    return ax


def plot_round_agreement(view: LayerView, neighbors: int = 8, ax: Any = None) -> Any:
    """Plot the fraction of nearest neighbors that share a bucket over the number of rounds (`num_hashes`)."""
    share = round_agreement(view, neighbors).cpu()
    rounds = torch.arange(1, len(share) + 1)
    ax = _axes(ax)
    ax.plot(rounds, share, marker="o", label="nearest neighbors")
    ax.plot(rounds, 1 - (1 - 1 / view.num_buckets) ** rounds, color="gray", linestyle="--", label="by chance")
    ax.set(xlabel="hash rounds", ylabel="share with a common bucket", title="agreement of rounds", ylim=(0, 1.02))
    ax.locator_params("x", integer=True)
    ax.legend(loc="lower right", frameon=False)
    return ax


def plot_attention_found(layers: Sequence[AttentionFound], ax: Any = None) -> Any:
    """Plot how much exact attention beyond the local window hash orders find, compared with as many other keys.

    Draws one group of bars per head from the result of `attention_found`; its label gives the share of the head's
    attention that lies beyond the window.
    """
    if not layers:
        raise ValueError("There is nothing to plot: no layer hashed this input.")
    groups = [(layer, head) for layer in layers for head in range(len(layer.found))]
    bars = {
        "hash orders": "hashed",
        "more local tokens": "more_local",
        "random keys": "random",
        "best possible": "best",
    }
    colors = _color("hash 1"), _color("position"), "0.9", "white"
    ax = _axes(ax)
    for i, ((label, name), color) in enumerate(zip(bars.items(), colors, strict=True)):
        heights = [float(getattr(layer, name)[head]) for layer, head in groups]
        places = [group + (i - 1.5) * 0.2 for group in range(len(groups))]
        ax.bar(places, heights, 0.2, label=label, color=color, edgecolor="black", linewidth=0.5)
    names = [f"layer {layer.layer}\nhead {head}\n({layer.beyond[head]:.0%})" for layer, head in groups]
    ax.set_xticks(range(len(groups)), names)
    ax.set(xlabel="(share of attention beyond the window)", ylabel="share of it that is found", ylim=(0, 1.02))
    ax.set_title("what hashing finds beyond the local window")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plots need matplotlib. In a clone: `pip install -e '.[train]'`.") from error
    return plt.subplots(layout="constrained")[1]


def _show(ax: Any, image: torch.Tensor, row_step: int, column_step: int, **options: Any) -> Any:
    """Draw an image of pairs, with axes in tokens."""
    extent = (-0.5, image.shape[1] * column_step - 0.5, image.shape[0] * row_step - 0.5, -0.5)
    ax.set(xlabel="attends to", ylabel="token")
    return ax.imshow(image.numpy(), extent=extent, interpolation="nearest", **options)


def _color(name: str) -> Any:
    """Return gray for the position order, a color for a hash round, black or dark gray for exploration."""
    from matplotlib import colormaps

    kind, _, number = name.partition(" ")
    if kind == "hash":
        return colormaps["tab10"]((int(number) - 1) % 10)
    return "0.75" if kind == "position" else str(min(0.15 * (int(number) - 1), 0.45))
