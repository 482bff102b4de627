"""Peak memory and time of a training step, and inference, on one sequence of 1,048,576 tokens (paper, section 1).

The sequence is the source code of Python's standard library, as bytes; the model is a byte language model with six
layers. Each job runs in a separate process, so that peak memory is measured per job.

    python experiments/million_tokens.py                # train, then infer
    python experiments/million_tokens.py --jobs infer --length 262144
"""

import multiprocessing
import os
import resource
import signal
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

from hf_reformer import ReformerConfig, ReformerForCausalLM


@dataclass
class Arguments:
    jobs: list[str] = HfArg(default_factory=lambda: ["train", "infer"], help="train, infer or both")
    length: int = HfArg(default=2**20, help="tokens (bytes) in the one sequence")
    layers: int = 6
    hidden_size: int = 256
    feed_forward_size: int = 512
    num_hashes: int = 2
    chunk_size_feed_forward: int = HfArg(default=0, help="tokens per chunk in token-wise parts")
    residual_precision: str = HfArg(default="float32", help="of the residual streams: float32 or float64")
    bf16: bool = HfArg(default=False, help="bfloat16 autocast")
    learning_rate: float = 1e-3


def read_bytes(length: int) -> torch.Tensor:
    """Read the standard library's source files, concatenated, (1, length) int64.

    Raises:
        ValueError: the files are shorter than `length` in total.
    """
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts or len(text) >= length:
            continue
        text += path.read_bytes()
    if len(text) < length:
        raise ValueError(f"The standard library has {len(text)} bytes of source, fewer than --length {length}.")
    return torch.frombuffer(text[:length], dtype=torch.uint8).long()[None]


def make_model(args: Arguments) -> ReformerForCausalLM:
    config = ReformerConfig(
        vocab_size=256, num_hidden_layers=args.layers, hidden_size=args.hidden_size, num_hashes=args.num_hashes,
        num_attention_heads=max(1, args.hidden_size // 64), feed_forward_size=args.feed_forward_size,
        max_position_embeddings=args.length, chunk_size_feed_forward=args.chunk_size_feed_forward,
        residual_precision=args.residual_precision, hidden_dropout_prob=0.0, is_decoder=True,
        pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return ReformerForCausalLM(config)


def show_layers(model: ReformerForCausalLM, passes: int) -> tqdm:
    """Show a progress bar over attention layers; backward runs each of them again."""
    bar = tqdm(total=passes * len(model.model.layers), unit="layer")

    def advance(*_) -> None:
        bar.update()

    for layer in model.model.layers:
        layer.attention.register_forward_hook(advance)
    return bar


def train(args: Arguments) -> None:
    """Run forward, backward and an AdamW step."""
    model = make_model(args).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    ids = read_bytes(args.length)
    with show_layers(model, passes=2), torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
        loss = model(ids, labels=ids).loss
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    print(f"loss {loss.item():.3f} (uniform: {torch.log(torch.tensor(256.0)):.3f}), gradient norm {norm:.3f}")


def infer(args: Arguments) -> None:
    """Compute the logits of the last token."""
    model = make_model(args).eval()
    ids = read_bytes(args.length)
    with torch.no_grad(), show_layers(model, passes=1), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        logits = model(ids, logits_to_keep=1).logits
    print(f"most likely next byte after {args.length} (untrained model): {bytes([int(logits[0, -1].argmax())])!r}")


def run_job(job: str, args: Arguments) -> None:
    """Run one job; print its time and this process's peak resident memory."""
    set_seed(0)
    begin = time.perf_counter()
    {"train": train, "infer": infer}[job](args)
    seconds = time.perf_counter() - begin
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(
        f"{job}: {args.length:,} tokens in {seconds:.0f} s ({args.length / seconds:,.0f} a second), "
        f"peak {peak / 2**30:.2f} GiB resident, {torch.get_num_threads()} threads"
    )


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if unknown := set(args.jobs) - {"train", "infer"}:
        raise SystemExit(f"--jobs {' '.join(sorted(unknown))}: the jobs are train and infer.")
    # glibc keeps freed blocks of up to 32 MB; with a fixed threshold, large ones are returned to the system.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))
    for job in args.jobs:
        process = multiprocessing.get_context("spawn").Process(target=run_job, args=(job, args))
        process.start()
        process.join()
        if process.exitcode:
            reason = " (the machine ran out of memory)" if process.exitcode == -signal.SIGKILL else ""
            raise SystemExit(f"{job} ended with exit code {process.exitcode}{reason}.")


if __name__ == "__main__":
    main()
