"""A Reformer layer: the two branches f (attention) and g (feed-forward) around a pair of residual streams."""

import inspect
import warnings
from types import NoneType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration_reformer import ReformerConfig
from ..reversible.chunking import Handoff
from ..reversible.grid import Grid, to_stream
from ..reversible.recompute import layer_tensors
from ..reversible.reversible import ReversibleFunction, StreamHandoff, residual_step
from .attention import ReformerAttention
from .feed_forward import FeedForward, LayerNorm
from .forward_context import ForwardContext
from .full_attention import FullAttention

COMPILED_PARTS = ("qkv_projection", "output_projection", "feed_forward_branch")
RECOMPILE_LIMIT = 64  # variants: kinds of layers, with and without autograd, first and later chunks


class ReformerLayer(GradientCheckpointingLayer):
    """y1 = x1 + f(x2), y2 = x2 + g(y1) (paper, equation 9); f = output_projection ∘ attend ∘ qkv_projection."""

    has_compiled_parts = False

    def __init__(self, config: ReformerConfig, layer: int):
        super().__init__()
        self.chunk_size = config.chunk_size_feed_forward
        self.attention_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        kinds: Any = config.attn_layers
        self.attention = (FullAttention if kinds[layer] == "full" else ReformerAttention)(config, layer)
        self.feed_forward_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.expected_types = [ReformerLayer, *map(type, _modules_of(self)[1:])]

    def is_unmodified(self) -> bool:
        """Whether the layer is as constructed: without adapters, hooks, other types of weights or compiled parts."""
        modules = _modules_of(self)
        if self.has_compiled_parts or [*map(type, modules)] != self.expected_types:
            return False
        for module in modules:  # in one pass, since generation calls this for every token
            own = module.__dict__
            hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
            if hooked or own["_backward_pre_hooks"] or "forward" in own:
                return False
            if any(type(x) not in (nn.Parameter, NoneType) for x in own["_parameters"].values()):
                return False
        return True

    def qkv_projection(self, x2: torch.Tensor, ctx: ForwardContext, offset: int) -> list[torch.Tensor | None]:
        """Project (B, T, D) to the inputs of `attend`, (B, T, H * head_size) each. `offset`: position of x2[:, 0]."""
        return self.attention.qkv(self.attention_norm(x2))

    def attend(self, projected: Handoff, ctx: ForwardContext, *states: torch.Tensor) -> tuple[Any, ...]:
        """Compute the attention output, (B, T, H * head_size), followed by the fields of an `AttentionReport`."""
        mixed, report = self.attention(projected, ctx)
        return mixed, *report

    def output_projection(self, mixed: torch.Tensor, ctx: ForwardContext, offset: int) -> torch.Tensor:
        return self.attention.output(mixed, ctx.layer_key, ctx.offset + offset)

    def feed_forward_branch(self, y1: torch.Tensor, ctx: ForwardContext, offset: int) -> torch.Tensor:
        return self.feed_forward(self.feed_forward_norm(y1), ctx.layer_key, ctx.offset + offset)

    def compile_parts(self, **options: Any) -> None:
        """Compile all parts except attention, which has compiled kernels; `options` are those of `torch.compile`.

        The parts run with and without autograd, and both have to give the same bits. So a forward pass that would
        not record a graph records and discards one (`has_compiled_parts`).
        """
        self.has_compiled_parts, self.compile_options = True, options
        options = {"dynamic": True, **options}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:  # torch 2.13 and later
            options.setdefault("recompile_limit", RECOMPILE_LIMIT)
        for name in COMPILED_PARTS:
            setattr(self, name, torch.compile(getattr(self, name), **options))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, without compiled parts: a copy compiles its own."""
        return {name: value for name, value in vars(self).items() if name not in COMPILED_PARTS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.has_compiled_parts:
            self.compile_parts(**self.compile_options)

    def forward(
        self,
        x2: torch.Tensor,
        x1: torch.Tensor,
        ctx: ForwardContext,
        grid: Grid,
        handoff: StreamHandoff | None = None,
        index: int = 0,
        *states: torch.Tensor,
    ) -> tuple[Any, ...]:
        """Map (x2, x1), each (B, T, D) in the grid's dtype, to (y2, y1).

        Args:
            handoff, index: handoff of a reversible stack and the layer's index in it; None: use the plain path.
            states: encoder states for `attend`, with gradients.

        Returns:
            (y2, y1), followed by the fields of an `AttentionReport` if any is set.
        """
        ctx = ctx.for_layer(self.attention.layer)
        if x2.dtype != grid.dtype:
            warnings.warn(
                f"The residual streams reach a layer as {x2.dtype}, not as {grid.dtype}: something casts what passes "
                "between layers, perhaps FSDP2's mixed precision. Memory then grows with depth. "
                "`hf_reformer.training.distributed.fsdp_policy()` is a policy that does not cast.",
                stacklevel=2,
            )
            x1, x2 = to_stream(x1, grid), to_stream(x2, grid)
        if handoff is None:
            y1, y2, *report = residual_step(self, x1, x2, ctx, grid, states)
            y1 = y1.view_as(y1)  # so that hooks on y1 see the same gradient as on the reversible path
        else:
            tensors = layer_tensors(self)
            y1, y2, *report = ReversibleFunction.apply(
                self, ctx, handoff, index, tuple(tensors), x1, x2, *states, *tensors.values()
            )
        return (y2, y1) if all(x is None for x in report) else (y2, y1, *report)


def _modules_of(module: nn.Module) -> list[nn.Module]:
    """List a module and its submodules, like `module.modules()` but five times as fast."""
    modules = [module]
    for parent in modules:  # the list grows during iteration
        modules += [child for child in parent._modules.values() if child is not None]
    return modules
