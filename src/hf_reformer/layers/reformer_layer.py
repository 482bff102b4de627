"""A Reformer layer: the two branches f (attention) and g (feed-forward) around a pair of residual streams."""

import inspect
import warnings
from types import NoneType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration_reformer import ReformerConfig
from ..ops.prng import fold
from ..reversible.grid import Grid, to_stream
from ..reversible.reversible import StreamHandoff, residual_step, reversible_step
from .attention import Call, ReformerAttention
from .feed_forward import FeedForward, LayerNorm
from .fused_decode import token_step

COMPILED = ("project", "merge", "g")


def modules_of(module: nn.Module) -> list[nn.Module]:
    """The module and all within it, as `module.modules()`, which takes five times as long."""
    found = [module]
    for one in found:  # which grows meanwhile
        found += [child for child in one._modules.values() if child is not None]
    return found


class ReformerLayer(GradientCheckpointingLayer):
    """y1 = x1 + f(x2), y2 = x2 + g(y1) (paper, equation 9); f is `project`, then `attend`, then `merge`."""

    def __init__(self, config: ReformerConfig, layer: int):
        super().__init__()
        self.chunk_size = config.chunk_size_feed_forward
        self.attention_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ReformerAttention(config, layer)
        self.feed_forward_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.expected_types = [ReformerLayer, *map(type, modules_of(self)[1:])]

    has_compiled_parts = False

    def is_unmodified(self) -> bool:
        """Whether nothing foreign sits in the layer: no adapters, hooks, weights of another kind or compiled parts."""
        modules = modules_of(self)
        if self.has_compiled_parts or [*map(type, modules)] != self.expected_types:
            return False
        for module in modules:  # one pass: generation asks for every token
            own = module.__dict__
            hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
            if hooked or own["_backward_pre_hooks"] or "forward" in own:
                return False
            if any(type(x) not in (nn.Parameter, NoneType) for x in own["_parameters"].values()):
                return False
        return True

    def told(self, call: Call) -> Call:
        """`call` with this layer's own key."""
        return call if call.key is None else call._replace(layer_key=fold(call.key, self.attention.layer))

    def project(self, x2: torch.Tensor, call: Call, first: int) -> list[torch.Tensor | None]:
        return self.attention.project(self.attention_norm(x2))

    def attend(self, projected: list[torch.Tensor | None], call: Call, known: Any = None) -> Any:
        """What attention gives; where the call asks for it, also what every token receives, (B, T).

        known: a list of the latter, where the layer runs again.
        """
        if call.paid is None:
            return self.attention(projected, call)
        received: list[torch.Tensor] = []
        mixed = self.attention(projected, call._replace(known=known[0] if known else None, received=received))
        return mixed, *received

    def merge(self, mixed: torch.Tensor, call: Call, first: int) -> torch.Tensor:
        return self.attention.merge(mixed, call.layer_key, call.first + first)

    def g(self, y1: torch.Tensor, call: Call, first: int) -> torch.Tensor:
        return self.feed_forward(self.feed_forward_norm(y1), call.layer_key, call.first + first)

    def compile_parts(self, **options: Any) -> None:
        """Compile all but attention, which is compiled as it is; `options` are `torch.compile`'s.

        The parts are called with and without a graph. Both have to give the same bits, so a forward that would record
        none records one too and drops it (`has_compiled_parts`).
        """
        self.has_compiled_parts, self.compile_options = True, options
        options = {"dynamic": True, **options}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:  # torch 2.13 and later
            limit = 64  # kinds of layers, with and without graph, first slices and others
            options.setdefault("recompile_limit", limit)
        for name in COMPILED:
            setattr(self, name, torch.compile(getattr(self, name), **options))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: compiled parts belong to this very layer, so a copy compiles its own."""
        return {name: value for name, value in vars(self).items() if name not in COMPILED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.has_compiled_parts:
            self.compile_parts(**self.compile_options)

    def forward(
        self,
        x2: torch.Tensor,
        x1: torch.Tensor,
        call: Call,
        grid: Grid,
        chain: StreamHandoff | None = None,
        index: int = 0,
        *extra: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """(x2, x1) → (y2, y1), each (B, T, D) in the grid's dtype; then what tokens receive, if the call asks for it.

        Reversibly, as number `index` of a `chain`; without one on the plain path. `extra` is what `attend` looks at
        besides, with gradients.
        """
        call = self.told(call)
        if x2.dtype != grid.dtype:
            warnings.warn(
                f"The residual streams reach a layer as {x2.dtype}, not as {grid.dtype}: something casts what passes "
                "between layers, perhaps FSDP2's mixed precision. Memory then grows with depth. "
                "`hf_reformer.distributed.fsdp_policy()` is a policy that does not cast.",
                stacklevel=2,
            )
            x1, x2 = to_stream(x1, grid), to_stream(x2, grid)
        if chain is None and (found := token_step([self], x1, x2, call)) is not None:
            y1, y2, received = *found, []
        elif chain is None:
            y1, y2, *received = residual_step(self, x1, x2, call, grid, extra)
            y1 = y1.view_as(y1)  # so that hooks on y1 see the same gradient as on the reversible path
        else:
            y1, y2, *received = reversible_step(self, x1, x2, call, chain, index, extra)
        return y2, y1, *received
