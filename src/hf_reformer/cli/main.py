"""The command line: `hf-reformer generate`, `chat`, `export`, `convert` and `env`."""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAMPLING = ("temperature", "top_p", "top_k")
CARD = ("language", "license", "datasets", "base_model", "tags", "dataset_name")


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    from .text_generation import load

    return load(args.model, args.device, args.dtype, args.trust_remote_code)


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the options of `text_generation.generate`."""
    from transformers import set_seed

    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    needless = given if args.greedy else [name for name in given if name != "temperature" and args.temperature == 0]
    if needless:
        raise ValueError(f"--greedy always takes the likeliest token. Leave out --{', --'.join(needless)}.")
    if args.seed is not None:
        set_seed(args.seed)
    greedy = args.greedy or args.temperature == 0
    options = {"max_new_tokens": args.max_new_tokens, "stream": not args.no_stream, "do_sample": not greedy}
    if args.prefill_chunk_size is not None:
        options["prefill_chunk_size"] = args.prefill_chunk_size
    return options if greedy else options | given


def run_generate(args: argparse.Namespace) -> None:
    """Continue a text, by default the one on stdin.

    The tokenizer's bos token, if it has one, stands before the prompt, as in training with scripts/train_lm.py, and
    ends the new text as eos does.
    """
    from .text_generation import generate, prompt_ids, special_ids

    options = generation_options(args)
    model, tokenizer = load(args)
    text = args.prompt
    if text is None:
        text = (
            Path(args.prompt_file).read_bytes().decode(errors="surrogateescape")
            if args.prompt_file
            else sys.stdin.read()
        )
        text = text.removesuffix("\n")
    check_utf8(text, args.prompt_file or "The prompt")
    ids = prompt_ids(model, tokenizer, text, bos=not args.no_bos)
    options |= special_ids(model, tokenizer, None if args.no_bos else tokenizer.bos_token_id)
    options |= {"use_cache": False} if args.no_cache else {}
    if args.num_return_sequences > 1:
        options |= {"num_return_sequences": args.num_return_sequences, "stream": False}
    generate(model, tokenizer, ids, **options)


def run_chat(args: argparse.Namespace) -> None:
    """Talk to a model, a line a turn, in the form of its tokenizer's chat template.

    /reset forgets all turns, /save FILE writes them as lines of JSON, /quit or ctrl-D ends.
    """
    from .text_generation import Conversation, special_ids

    options = generation_options(args)
    model, tokenizer = load(args)
    check_utf8(args.system or "", "--system")
    conversation = Conversation(model, tokenizer, args.system, **special_ids(model, tokenizer), **options)
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/reset":
                conversation.reset()
            elif command == "/save":
                conversation.save(rest)
            elif re.fullmatch("/[a-z]+", line):
                raise ValueError(f"{command} is no command. There are /reset, /save FILE and /quit.")
            elif line:
                check_utf8(line, "The line")
                conversation.answer(line)
        except (OSError, ValueError) as error:
            if not terminal:
                raise
            print(one_line(error), file=sys.stderr)


def run_export(args: argparse.Namespace) -> None:
    """Write a folder for the Hub: weights, their code, and a model card.

    `from_pretrained(folder, trust_remote_code=True)` then works where this package is not installed, too.
    """
    from ..hub.exporting import export
    from ..hub.model_folder import quiet

    card = {name: getattr(args, name) for name in CARD if getattr(args, name) is not None}
    with quiet():
        folder = export(args.model, args.output, overwrite=args.overwrite, name=args.name, **card)
    print_what_lacks(folder)
    print(f"Read {folder / 'README.md'} and complete it; then: hf upload {args.name or 'NAME'} {folder}")


def run_convert(args: argparse.Namespace) -> None:
    """Read an old checkpoint, write it as a folder of ours or of transformers' own Reformer.

    What is not the same afterwards is printed, a line each.
    """
    from ..hub.convert import convert
    from ..hub.model_folder import quiet

    options = {"kind": args.kind, "to": args.to, "head": args.head, "attention_mode": args.attention_mode}
    options |= {"fields": json_fields(args.fields), "lm_bias": not args.no_lm_bias}
    with quiet():
        notes = convert(args.source, args.output, **options)
    for note in notes:
        print(f"- {note}")
    print_what_lacks(Path(args.output))


def print_what_lacks(folder: Path) -> None:
    """Where a folder was written without a tokenizer, say so."""
    if not any((folder / name).exists() for name in ("tokenizer_config.json", "processor_config.json")):
        print(f"There was no tokenizer. Put one into {folder} with `tokenizer.save_pretrained`: pipelines want one.")


def json_fields(text: str | None) -> dict[str, Any] | None:
    """What a JSON object, or a file that holds one, says."""
    if text is None:
        return None
    try:
        found = json.loads(text if text.lstrip()[:1] in ("{", "[") else Path(text).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--fields is no JSON: {error}.") from error
    except OSError as error:
        raise ValueError(f"--fields {text} is neither a JSON object nor a file that can be read.") from error
    if not isinstance(found, dict):
        raise ValueError('--fields must be a JSON object, such as {"num_buckets": 64}.')
    return found


def run_env(args: argparse.Namespace) -> None:
    """Print versions and devices, for reports of problems."""
    import platform

    import torch
    import transformers

    from .. import __version__
    from ..ops.dispatch import KERNELS, unsupported_reason

    fault = unsupported_reason("cpu")
    accelerators = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    devices = [f"{torch.accelerator.current_accelerator()}:{i}" for i in range(accelerators)]
    for name, value in {
        "hf_reformer": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "compiled CPU kernel": f"none: {fault}" if fault else KERNELS["cpu"].current_variant(),
        "devices": ", ".join(["cpu", *devices]),
    }.items():
        print(f"{name}: {value}")


def check_utf8(text: str, name: str) -> None:
    """Raise ValueError for what was read from bytes that are no UTF-8 (Python puts surrogates in their place)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not UTF-8: byte {text[error.start].encode(errors='surrogateescape')!r}."
        ) from error


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--model", required=True, metavar="PATH", help="folder of a causal language model, or its name on the Hub")
    add("--max_new_tokens", type=positive, default=256, metavar="N", help="at most so many tokens (256)")
    add("--temperature", type=float, metavar="T", help="divides the logits; 0 is --greedy; default: the model's own")
    add("--top_p", type=float, metavar="P", help="sample from the likeliest tokens, as many as make this probability")
    add("--top_k", type=int, metavar="K", help="sample from so many likeliest tokens; 0: from all")
    add("--greedy", action="store_true", help="take the likeliest token every time instead of sampling")
    add("--seed", type=int, metavar="S", help="makes samples repeat")
    add("--prefill_chunk_size", type=positive, metavar="N", help="read the prompt so many tokens at a time")
    add("--device", default="auto", help="cpu, cuda:1, …; auto: an accelerator, else the CPU")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", default="auto", choices=dtypes, help="of the weights; auto: as they were saved")
    add("--no_stream", action="store_true", help="print a text when it is finished")
    add("--trust_remote_code", action="store_true", help="run the code that comes with the model")

    parser = argparse.ArgumentParser(prog="hf-reformer", description="Language models on the command line.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, **options: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=run.__doc__.split("\n")[0], description=run.__doc__, **options)
        made.set_defaults(run=run)
        return made

    generate = command("generate", run_generate, parents=[shared])
    prompt = generate.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt_file", metavar="FILE", help="where it stands; a newline at its end is left out")
    generate.add_argument("--no_bos", action="store_true", help="put no bos token before the prompt")
    generate.add_argument("--no_cache", action="store_true", help="compute all tokens again for every new one")
    generate.add_argument("--num_return_sequences", type=positive, default=1, metavar="N", help="so many texts")
    chat = command("chat", run_chat, parents=[shared])
    chat.add_argument("--system", metavar="TEXT", help="what the model is told first")
    add = command("export", run_export).add_argument
    add("--model", required=True, metavar="SOURCE", help="a folder, such as a checkpoint; or a name on the Hub")
    add("--output", required=True, metavar="FOLDER", help="where to")
    add("--overwrite", action="store_true", help="though it is not empty; the model in it is replaced")
    add("--name", help="user/name on the Hub, for the model card; default: the folder's name")
    add("--language", nargs="+", metavar="CODE", help="of the texts: en, de, …")
    add("--license", metavar="ID", help="of the weights: apache-2.0, cc-by-4.0, …")
    add("--datasets", nargs="+", metavar="NAME", help="on the Hub, that it was trained on")
    add("--base_model", metavar="NAME", help="on the Hub, that it was trained from")
    add("--tags", nargs="+", metavar="TAG", help="to be found by")
    add("--dataset_name", metavar="TEXT", help="what it was evaluated on, in words")
    add = command("convert", run_convert).add_argument
    add("source", metavar="SOURCE", help="a folder of transformers' own Reformer or of ours, or a file of weights")
    add("output", metavar="OUTPUT", help="a folder that is empty or does not exist")
    kinds = ("builtin", "reformer-pytorch", "trax", "hf_reformer")
    add("--from", dest="kind", choices=kinds, help="what SOURCE is; found out where it can be")
    add("--to", choices=("hf_reformer", "builtin"), default="hf_reformer", help="what to write (hf_reformer)")
    add("--head", metavar="CLASS", help="ReformerForCausalLM, …; default: the class that a folder was saved from")
    add("--attention_mode", choices=("chunk", "window"), help="window: turn chunk mode into it")
    add("--fields", metavar="JSON", help="an object, or its file: what the weights don't say, or of window mode")
    add("--no_lm_bias", action="store_true", help="set the head's bias to 0, as transformers 5.0 to 5.23 compute")
    command("env", run_env)
    return parser


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return "hf-reformer: " + text.split(" Model type should be one of")[0]  # hundreds


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. The exit status is 2 where something is wrong that its user can change."""
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
    except BrokenPipeError:  # nobody reads on, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        print(one_line(error), file=sys.stderr)
        return 2
    return 0
