"""Does the coverage loss make attention look everywhere, and does that help where the answer lies everywhere?

    python scripts/coverage_experiment.py                    # some minutes on two cores

The task: among random tokens stand a few marked ones, at random places, each a 0 or a 1; which of the two is in the
majority? A causal model answers at the last token, and no window holds more than a small part of the input. Every
seed trains without the coverage loss and with each of its weights, on the same data from the same initial weights. A
line of the table is a mean over seeds, with the least and the most.
"""

import argparse
from collections.abc import Sequence

import torch

from hf_reformer import ReformerConfig, ReformerForSequenceClassification
from hf_reformer.coverage import reached_share, received_entropy
from hf_reformer.coverage_callback import received_by_layer

NOISE = 30  # kinds of tokens without meaning; the two that count follow
ZERO, ONE = NOISE, NOISE + 1


def make_batch(rows: int, length: int, marked: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (rows, length) and answers (rows)."""
    tokens = torch.randint(1, NOISE, (rows, length), generator=generator)
    places = torch.rand(rows, length, generator=generator).argsort(-1)[:, :marked]
    bits = torch.randint(0, 2, (rows, marked), generator=generator)
    return tokens.scatter_(1, places, ZERO + bits), (2 * bits.sum(-1) > marked).long()


def make_model(length: int, weight: float) -> ReformerForSequenceClassification:
    config = ReformerConfig(
        vocab_size=NOISE + 2, hidden_size=64, num_attention_heads=2, attention_head_size=32, feed_forward_size=128,
        attn_layers=["lsh", "lsh", "lsh"], max_position_embeddings=length, lsh_window=16, local_window=16,
        hidden_dropout_prob=0.0, is_decoder=True, coverage_loss_weight=weight,
    )  # fmt: skip
    config.num_labels = 2
    return ReformerForSequenceClassification(config)


def train(seed: int, weight: float, arguments: argparse.Namespace) -> dict[str, float]:
    """Train one model; what it does on rows that it has not seen."""
    torch.manual_seed(seed)
    model = make_model(arguments.length, weight).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    data = torch.Generator().manual_seed(seed)
    for _ in range(arguments.steps):
        tokens, answers = make_batch(arguments.rows, arguments.length, arguments.marked, data)
        loss = model(tokens, labels=answers).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return evaluate(model.eval(), arguments)


@torch.no_grad()
def evaluate(model: ReformerForSequenceClassification, arguments: argparse.Namespace) -> dict[str, float]:
    tokens, answers = make_batch(256, arguments.length, arguments.marked, torch.Generator().manual_seed(10**6))
    out = model(tokens, labels=answers, output_coverage=True)
    received = received_by_layer(model, tokens)
    return {
        "accuracy": (out.logits.argmax(-1) == answers).double().mean().item(),
        "tokens reached": reached_share(received).mean().item(),
        "entropy": received_entropy(received).mean().item(),
        "coverage loss": out.coverage_loss.mean().item(),
    }


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.1, 1.0], help="of the coverage loss")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=16, help="of a training batch")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument(
        "--marked", type=int, default=9, help="marked tokens of a row; odd, so that there is a majority"
    )
    arguments = parser.parse_args(given)
    if arguments.marked % 2 == 0 or arguments.marked > arguments.length:
        parser.error(f"--marked {arguments.marked} must be odd and at most --length {arguments.length}.")
    for weight in arguments.weights:
        runs = [train(seed, weight, arguments) for seed in range(arguments.seeds)]
        numbers = {name: [run[name] for run in runs] for name in runs[0]}
        shown = (f"{name} {sum(x) / len(x):.3f} ({min(x):.3f} to {max(x):.3f})" for name, x in numbers.items())
        print(f"weight {weight:g}: " + ", ".join(shown), flush=True)


if __name__ == "__main__":
    main()
