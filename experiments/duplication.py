"""Learn to copy: the duplication task of the paper (section 5.1), a test of whether LSH attention can learn.

A sequence is 0 w 0 w with a random word w. The model predicts the second w, each symbol of which has occurred half the
sequence earlier. Only hashing can find it: the order by position is off and the windows are short. Prints the accuracy
with 1, 2, 4 and 8 hash rounds at evaluation, per seed.

    python experiments/duplication.py --seeds 0 1 2
    python experiments/duplication.py --attention_mode chunk --seeds 0 1 2
"""

from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

from hf_reformer import ReformerConfig, ReformerForCausalLM


@dataclass
class Arguments:
    attention_mode: str = HfArg(default="window", help="window or chunk")
    steps: int = HfArg(default=5000, help="maximum number of training steps")
    target: float = HfArg(default=0.99, help="stop when 4 rounds reach this accuracy; above 1: never")
    evaluate_every: int = 500
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    length: int = 128
    symbols: int = HfArg(default=127, help="size of the alphabet of w")
    window: int = HfArg(default=24, help="window mode: positions a token sees in each sort order")
    chunk: int = HfArg(default=16, help="chunk mode: chunk length, looking one chunk back")
    num_buckets: int = HfArg(default=0, help="0: 8 in window mode, 16 in chunk mode")
    num_hashes: int = HfArg(default=2, help="rounds in training")
    hidden_size: int = 128
    num_attention_heads: int = 2
    batch_size: int = 16
    learning_rate: float = 1e-3


def make_model(args: Arguments) -> ReformerForCausalLM:
    config = ReformerConfig(
        vocab_size=args.symbols + 1, attn_layers=["lsh"], attention_mode=args.attention_mode,
        hidden_size=args.hidden_size, num_attention_heads=args.num_attention_heads,
        attention_head_size=args.hidden_size // args.num_attention_heads, feed_forward_size=2 * args.hidden_size,
        num_hashes=args.num_hashes, num_buckets=args.num_buckets or (16 if args.attention_mode == "chunk" else 8),
        lsh_window=args.window, lsh_include_local=False, lsh_attn_chunk_length=args.chunk, hidden_dropout_prob=0.0,
        max_position_embeddings=args.length, position_embedding_type="learned", is_decoder=True,
        pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return ReformerForCausalLM(config)


def draw(args: Arguments, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences 0 w 0 w and their labels, -100 outside the second w: (rows, length) each."""
    half = args.length // 2
    word = torch.randint(1, args.symbols + 1, (rows, half - 1), generator=generator)
    word = torch.nn.functional.pad(word, (1, 0))  # 0 w
    labels = torch.cat([torch.full_like(word, -100), word], dim=1)
    labels[:, half] = -100
    return torch.cat([word, word], dim=1), labels


@torch.no_grad()
def accuracy(model: ReformerForCausalLM, args: Arguments, rounds: int) -> float:
    ids, labels = draw(args, 64, torch.Generator().manual_seed(12345))
    model.eval()
    guess = model(ids, num_hashes=rounds).logits[:, :-1].argmax(-1)
    targets = labels[:, 1:]
    model.train()
    return (guess == targets)[targets != -100].float().mean().item()


def learn(args: Arguments, seed: int) -> tuple[int, dict[int, float]]:
    """Train one model: (steps used, accuracy by number of rounds)."""
    set_seed(seed)
    model = make_model(args).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    data = torch.Generator().manual_seed(seed)
    bar = tqdm(range(1, args.steps + 1), desc=f"{args.attention_mode}, seed {seed}", mininterval=2)
    result: dict[int, float] = {}
    for step in bar:
        ids, labels = draw(args, args.batch_size, data)
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % args.evaluate_every == 0 or step == args.steps:
            result = {rounds: accuracy(model, args, rounds) for rounds in (1, 2, 4, 8)}
            bar.set_postfix_str(f"loss {loss.item():.3f}, " + ", ".join(f"{r}: {a:.1%}" for r, a in result.items()))
            if result[4] >= args.target:
                return step, result
    return args.steps, result


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    for seed in args.seeds:
        steps, result = learn(args, seed)
        scores = "  ".join(f"{rounds} rounds {share:6.1%}" for rounds, share in result.items())
        print(f"{args.attention_mode}  seed {seed}  {steps} steps  {scores}", flush=True)


if __name__ == "__main__":
    main()
