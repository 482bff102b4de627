"""Popular alternatives from transformers' own configs, in the sizes of `models`: classifiers and causal models.

All have random weights, no dropout, and float32. Gated feed-forwards have three matrices with as many weights as the
two of the others, within 2 %. In all models with windows, a token sees about 256 tokens per layer:

- hf_reformer with its default config: 128 in local layers; in lsh layers 128 and 2 × 128 by hash, and in training 128
  more by exploration. On average over the layers 256, in training 320.
- Longformer: 257 around it, and the first token, which sees everything.
- BigBird: three blocks around it, three random ones, the first and the last, of 32 tokens each: 256.
- ModernBERT: 257 around it in two out of three layers, everything in the third.
- Mistral: the last 256. Llama: everything before it. Mamba: a state of all tokens before it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

import hf_reformer

from .cases import INFERENCE, STEP, Case, Entry, Group, Run, Settings
from .models import FEED_FORWARD, HEADS, HIDDEN, LAYERS, ROUNDS, VOCABULARY, hf_reformer_config, hf_reformer_model
from .training import CHECKPOINTS_FROM, training_step

SEEN = 256  # tokens visible to a token per layer
GATED = 672  # width of a gated feed-forward: about two thirds of FEED_FORWARD
CLASSES, LABEL = 2, 1
BLOCKS = 8  # visible to a token in BigBird: 3 around it, 3 random, 2 at the ends
CLASSIFIERS = ("hf-reformer", "longformer", "bigbird", "modernbert", "mamba")
CAUSAL = ("hf-reformer", "llama", "mistral")
SLOW = ("mamba",)  # a step on 1024 tokens takes minutes


def groups(section: str, causal: bool, impls: tuple[str, ...], settings: Settings) -> list[Group]:
    """Return groups of training steps, their memory, and inference, over length."""
    found = []
    for length in settings.choose((1024, 4096, 16384, 65536), (1024, 2048)):
        for work in (STEP, INFERENCE):
            case = Case(section=section, length=length, work=work, rounds=ROUNDS, causal=causal, layers=LAYERS)
            entries = [Entry(case, impl) for impl in impls if not (settings.short and impl in SLOW)]
            if work == STEP or not settings.short:
                found.append(Group("memory", entries, LAYERS))
            if causal and work == INFERENCE and not settings.short:
                entries = [*entries, Entry(case, "mistral flex")]  # compiles for a minute; no backward on CPUs
            found.append(Group("time", entries, LAYERS))
    return sorted(found, key=lambda group: (group.entries[0].case.length, group.quantity == "memory"))


def classifier_groups(settings: Settings) -> list[Group]:
    return groups("classifier", False, CLASSIFIERS, settings)


def causal_groups(settings: Settings) -> list[Group]:
    return groups("causal", True, CAUSAL, settings)


def make(case: Case, impl: str) -> Run:
    """Make a training step, or inference: logits of the classes, or of the token after the last."""
    torch.manual_seed(0)
    model: Any = make_model(case, impl).to(case.device)
    tokens = torch.randint(2, VOCABULARY, (1, case.length), device=case.device)
    if case.work == STEP:
        notes = []
        if impl != "hf-reformer" and case.length >= CHECKPOINTS_FROM:
            model.gradient_checkpointing_enable()
            notes.append("recomputes its layers")
        if impl == "bigbird" and case.dtype != "float32":  # under autocast it scatters one dtype into another
            model, case = model.to(case.torch_dtype), replace(case, dtype="float32")
            notes.append("all its weights in half precision, without autocast")
        labels = tokens if case.causal else torch.full((1,), LABEL, device=case.device)
        return Run(training_step(model.train(), case, tokens, labels), note=", ".join(notes))
    model.eval().to(case.torch_dtype)
    options = {"use_cache": False, "logits_to_keep": 1} if case.causal else {}
    return Run(torch.no_grad()(lambda: model(input_ids=tokens, **options).logits))


def make_model(case: Case, impl: str) -> nn.Module:
    """Make a classifier or a causal model by name."""
    length, layers = case.length, case.layers
    makers: dict[tuple[bool, str], Callable[[], nn.Module]] = {
        (False, "hf-reformer"): lambda: hf_reformer_classifier(length, layers),
        (False, "longformer"): lambda: longformer(length, layers),
        (False, "bigbird"): lambda: bigbird(length, layers),
        (False, "modernbert"): lambda: modernbert(length, layers),
        (False, "mamba"): lambda: MambaClassifier(layers),
        (True, "hf-reformer"): lambda: hf_reformer_model(length, layers),
        (True, "llama"): lambda: llama(length, layers),
        (True, "mistral"): lambda: mistral(length, layers, "sdpa"),
        (True, "mistral flex"): lambda: mistral(length, layers, "flex_attention"),
    }
    return makers[case.causal, impl]()


def common(layers: int) -> dict[str, Any]:
    """Return the config fields shared by all rivals."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }


def attending(length: int, layers: int, feed_forward: int) -> dict[str, Any]:
    """Return the config fields shared by all rivals with attention."""
    return common(layers) | {
        "num_attention_heads": HEADS,
        "intermediate_size": feed_forward,
        "max_position_embeddings": length,
    }


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def hf_reformer_classifier(length: int, layers: int) -> nn.Module:
    config = hf_reformer_config(length, layers, causal=False, num_labels=CLASSES)
    return hf_reformer.ReformerForSequenceClassification(config)


def longformer(length: int, layers: int) -> nn.Module:
    """Make a Longformer; its positions start after the padding token's id."""
    sizes = attending(length, layers, FEED_FORWARD) | {"max_position_embeddings": length + 1}
    config = transformers.LongformerConfig(**sizes, **NO_DROPOUT, attention_window=SEEN, num_labels=CLASSES)
    return transformers.LongformerForSequenceClassification(config)


def bigbird(length: int, layers: int) -> nn.Module:
    """Make a BigBird with block-sparse attention.

    Raises:
        ValueError: at this length it would use full attention instead.
    """
    config = transformers.BigBirdConfig(
        **attending(length, layers, FEED_FORWARD),
        **NO_DROPOUT,
        attention_type="block_sparse",
        block_size=SEEN // BLOCKS,
        num_labels=CLASSES,
    )
    shortest = (5 + 2 * config.num_random_blocks) * config.block_size
    if length <= shortest:
        raise ValueError(
            f"length {length}: up to {shortest} tokens, BigBird in blocks of {config.block_size} sees everything. "
            "Measure it at longer ones."
        )
    return transformers.BigBirdForSequenceClassification(config)


def modernbert(length: int, layers: int) -> nn.Module:
    config = transformers.ModernBertConfig(
        **attending(length, layers, GATED),
        local_attention=SEEN,
        cls_token_id=1,
        sep_token_id=1,
        num_labels=CLASSES,
        attn_implementation="sdpa",
    )
    return transformers.ModernBertForSequenceClassification(config)


class MambaClassifier(nn.Module):
    """transformers' Mamba, which has no classification head, with one on the mean over all tokens."""

    def __init__(self, layers: int):
        super().__init__()
        self.model = transformers.MambaModel(transformers.MambaConfig(**common(layers), use_cache=False))
        self.classifier = nn.Linear(HIDDEN, CLASSES)

    def gradient_checkpointing_enable(self) -> None:
        self.model.gradient_checkpointing_enable()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        """Compute logits (1, classes) of tokens (1, T), and the loss for a label (1,)."""
        logits = self.classifier(self.model(input_ids).last_hidden_state.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


def llama(length: int, layers: int) -> nn.Module:
    config = transformers.LlamaConfig(**attending(length, layers, GATED), use_cache=False, attn_implementation="sdpa")
    return transformers.LlamaForCausalLM(config)


def mistral(length: int, layers: int, attention: str) -> nn.Module:
    """Make a Mistral with sliding windows: `sdpa` with a mask of all pairs, or compiled `flex_attention` in blocks."""
    config = transformers.MistralConfig(
        **attending(length, layers, GATED),
        num_key_value_heads=HEADS,
        sliding_window=SEEN,
        use_cache=False,
        attn_implementation=attention,
    )
    return transformers.MistralForCausalLM(config)
