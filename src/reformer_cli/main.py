"""The command line: `hf-reformer train`, `generate`, `chat`, `export`, `convert` and `env`.

What a command needs is imported in its `run_…`.
"""

import argparse
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from .streams import Lasting, discard, finish_output, prepare_streams

LONGEST = 2**26  # characters of a prompt
COLD = 1e-5  # a lower temperature leaves the most likely token alone, and logits divided by it may overflow
LOST_PEER = (
    "Another process of this run has ended or cannot be reached, so this one ends, too. What the other one wrote last "
    "says why; the run goes on from its newest checkpoint with --resume_from_checkpoint last. (Found: {})"
)
SAMPLING = ("temperature", "top_p", "top_k")
RECIPES = {  # a module of `hf_reformer.recipes` each
    "classification": "label texts or pairs of texts, or predict a number for them",
    "language-model": "causal and masked language models, evaluated in bits per byte",
    "seq2seq": "translation, summarisation, any text to any other",
    "question-answering": "find the answer to a question in a document",
    "token-classification": "label every word: names, parts of speech",
    "multiple-choice": "choose the right one of several endings or answers",
    "recommendation": "recommend the next item to every user",
    "chat": "answer in conversations, which `hf-reformer chat` then holds",
    "speech-recognition": "write down what is said, in recordings of any length",
    "audio-classification": "label recordings: words, sounds, speakers",
    "image-classification": "label pictures, by their pixels or patches",
    "image-generation": "draw pictures pixel by pixel, evaluated in bits per dimension",
    "forecasting": "forecast time series, several at once, and the ways of cars",
}
CARD = ("language", "license", "datasets", "base_model", "tags", "dataset_name")


def run_train(args: argparse.Namespace) -> None:
    """Train a model. `hf-reformer train RECIPE --help` lists the options of a recipe."""
    if args.recipe is None:
        make_parser().parse_args(["train", "--help"])
    from hf_reformer.recipes import load_recipe

    with redirect_stdout(Lasting(sys.stdout or sys.stderr)), redirect_stderr(Lasting(sys.stderr)):
        recipe = load_recipe(args.recipe)
        try:
            recipe.main(args.arguments)
        except RuntimeError as error:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1 and re.search("gloo|nccl|connection", str(error), re.I):
                raise ConnectionError(LOST_PEER.format(error)) from error
            raise
        except BrokenPipeError as error:  # not of stdout, which lasts
            raise RuntimeError(f"A pipe between processes broke: {error}") from error


def load(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its tokenizer, and the options for `text_generation.generate`."""
    from .text_generation import load

    check_stdout()
    for name, most in {"temperature": sys.float_info.max, "top_p": 1, "top_k": sys.maxsize}.items():
        value = getattr(args, name)
        if value is not None and not 0 <= value <= most:  # nor is NaN
            raise ValueError(f"--{name} {value} is not between 0 and {most}.")
    greedy = args.greedy or (args.temperature is not None and args.temperature < COLD)
    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if unused := [name for name in sampling if args.greedy or (name != "temperature" and greedy)]:
        raise ValueError(f"--greedy always takes the most likely token. Leave out --{', --'.join(unused)}.")
    if args.seed is not None:
        from transformers import set_seed  # which imports half of the library

        set_seed(args.seed)
    model, tokenizer = load(args.model, args.device, args.dtype, args.trust_remote_code)
    saved = model.generation_config.temperature
    greedy = greedy or (args.temperature is None and saved is not None and 0 <= saved < COLD)
    options = {"max_new_tokens": args.max_new_tokens, "stream": not args.no_stream, "do_sample": not greedy}
    options |= {} if greedy else sampling
    options |= {"prefill_chunk_size": args.prefill_chunk_size} if args.prefill_chunk_size else {}
    return model, tokenizer, options


def run_generate(args: argparse.Namespace) -> None:
    """Continue a text, by default the one on stdin.

    The tokenizer's bos token, if it has one, is put before the prompt, as `hf-reformer train language-model` puts it
    before each document; like eos, it ends the new text.
    """
    from .text_generation import generate, prompt_ids, special_ids

    text = read_prompt(args)
    model, tokenizer, options = load(args)
    ids = prompt_ids(model, tokenizer, text, bos=not args.no_bos)
    options |= special_ids(model, tokenizer, None if args.no_bos else tokenizer.bos_token_id)
    options |= {"use_cache": False} if args.no_cache else {}
    if args.num_return_sequences > 1:
        options |= {"num_return_sequences": args.num_return_sequences, "stream": False}
    generate(model, tokenizer, ids, **options)


def run_chat(args: argparse.Namespace) -> None:
    """Talk to a model, a line per turn, with its tokenizer's chat template.

    /reset forgets all turns, /save FILE writes them as lines of JSON, /quit or ctrl-D ends the chat.
    """
    from .text_generation import Conversation, special_ids

    if sys.stdin is None:
        raise ValueError("stdin is closed, and a chat reads its turns from there.")
    system = None if args.system is None else checked(args.system, "--system")
    model, tokenizer, options = load(args)
    conversation = Conversation(model, tokenizer, system, **special_ids(model, tokenizer), **options)
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
                conversation.answer(checked(line, "The line"))
        except BrokenPipeError:
            raise
        except Exception as error:
            if not terminal:
                raise
            print(one_line(error), file=sys.stderr)


def run_export(args: argparse.Namespace) -> None:
    """Write a directory for the Hub: weights, their code, and a model card.

    `from_pretrained(folder, trust_remote_code=True)` then works without this package.
    """
    from hf_reformer.hub.exporting import export
    from hf_reformer.hub.model_folder import quiet

    card = {name: getattr(args, name) for name in CARD if getattr(args, name) is not None}
    with quiet():
        folder = export(args.model, args.output, overwrite=args.overwrite, name=args.name, **card)
    report_missing_tokenizer(folder)
    print(f"Read and complete {folder / 'README.md'}; then: hf upload {args.name or 'NAME'} {folder}")


def run_convert(args: argparse.Namespace) -> None:
    """Convert an old checkpoint to this package's Reformer or to the one of transformers.

    Differences between the two models are printed, one per line.
    """
    from hf_reformer.hub.convert import convert
    from hf_reformer.hub.model_folder import quiet

    options = {name: getattr(args, name) for name in ("kind", "to", "head", "attention_mode")}
    options |= {"fields": json_fields(args.fields), "lm_bias": not args.no_lm_bias}
    with quiet():
        notes = convert(args.source, args.output, **options)
    for note in notes:
        print(f"- {note}")
    report_missing_tokenizer(Path(args.output))


def report_missing_tokenizer(folder: Path) -> None:
    """Print a line if the directory was written without a tokenizer."""
    if not any(
        (folder / name).exists()
        for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
    ):
        print(f"There was no tokenizer. Save one to {folder} by `tokenizer.save_pretrained`: pipelines need it.")


def json_fields(text: str | None) -> dict[str, Any] | None:
    """The fields of a JSON object, which the text is or names the file of."""
    if text is None:
        return None
    try:
        fields = json.loads(text if text.lstrip()[:1] in ("{", "[") else Path(text).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--fields is no JSON: {error}.") from error
    except OSError as error:
        raise ValueError(f"--fields {text} is neither a JSON object nor a file that can be read.") from error
    if not isinstance(fields, dict):
        raise ValueError('--fields must be a JSON object, such as {"num_buckets": 64}.')
    return fields


def run_env(args: argparse.Namespace) -> None:
    """Print versions, devices and what computes attention on them, for bug reports.

    On a GPU whose kernels nothing has used yet they are checked first, which takes a minute or two.
    """
    import platform

    check_stdout()
    import torch
    import transformers

    from hf_reformer import __version__
    from hf_reformer.ops.dispatch import KERNELS, describe_backends, unsupported_reason

    reason, chosen = unsupported_reason("cpu"), os.environ.get("HF_REFORMER_BACKEND")
    accelerators = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    devices = [f"{torch.accelerator.current_accelerator()}:{i}" for i in range(accelerators)]
    for name, value in {
        "hf_reformer": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "compiled CPU kernel": f"none: {reason}" if reason else KERNELS["cpu"].current_variant(),
        "devices": ", ".join(["cpu", *devices]),
        **{f"attention on {device}": backend for device, backend in describe_backends().items()},
        "HF_REFORMER_BACKEND": f"{chosen}, which overrules these" if chosen else "not set",
    }.items():
        print(f"{name}: {value}")


def read_prompt(args: argparse.Namespace) -> str:
    """The text to continue, with \\n for \\r\\n; without a byte order mark, and without a newline at its end."""
    name = args.prompt_file or "The prompt"
    if args.prompt is not None:
        return checked(args.prompt, name)
    if args.prompt_file is not None:
        with open(args.prompt_file, encoding="utf-8", errors="surrogateescape", newline="") as file:
            text = file.read(LONGEST + 4)  # with a byte order mark and an end of line
    elif sys.stdin is None:
        raise ValueError("stdin is closed. Give the text by --prompt or --prompt_file.")
    else:
        text = sys.stdin.read(LONGEST + 4)
    return checked(text.removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n"), name)


def checked(text: str, name: str) -> str:
    """A text from outside. Bytes that Python could not read in the locale's encoding are read as UTF-8.

    Raises:
        ValueError: they are no UTF-8, or the text is too long to be a prompt.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{name} has more than {LONGEST:,} characters, which is more than a prompt can have.")
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not UTF-8: it has the lone surrogate {text[error.start]!a}.") from error
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.start + 1]
        raise ValueError(f"{name} is not UTF-8: byte {found!r} at position {error.start}.") from error


def check_stdout() -> None:
    """Raise ValueError if there is no stdout, for commands whose result is a text."""
    if sys.stdout is None:
        raise ValueError("stdout is closed, and the text would be lost. Redirect it to a file, or to /dev/null.")


def positive(text: str) -> int:
    """An integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, the function that runs it."""
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--model", required=True, metavar="PATH", help="directory or Hub name of a causal language model")
    add("--max_new_tokens", type=positive, default=256, metavar="N", help="at most this many tokens (256)")
    add("--temperature", type=float, metavar="T", help="divides the logits; 0 is --greedy; default: the model's own")
    add("--top_p", type=float, metavar="P", help="sample from the most likely tokens whose probabilities add up to P")
    add("--top_k", type=int, metavar="K", help="sample from the K most likely tokens; 0: from all")
    add("--greedy", action="store_true", help="always take the most likely token instead of sampling")
    add("--seed", type=int, metavar="S", help="makes sampling reproducible")
    add("--prefill_chunk_size", type=positive, metavar="N", help="read the prompt in chunks of N tokens")
    add("--device", default="auto", help="cpu, cuda:1, …; auto: an accelerator, else the CPU")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", default="auto", choices=dtypes, help="dtype of the weights; auto: as saved")
    add("--no_stream", action="store_true", help="print the text only when it is complete")
    add("--trust_remote_code", action="store_true", help="run the code that comes with the model")

    parser = argparse.ArgumentParser(prog="hf-reformer", description="Reformer models on the command line.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, **options: Any) -> argparse.ArgumentParser:
        description = inspect.getdoc(run) or ""  # none under `python -OO`
        subparser = commands.add_parser(name, help=description.split("\n")[0], description=description, **options)
        subparser.set_defaults(run=run)
        return subparser

    recipes = "recipes:\n" + "\n".join(f"  {name:20} {summary}" for name, summary in RECIPES.items())
    train = command("train", run_train, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=recipes)
    train.add_argument("recipe", nargs="?", choices=RECIPES, metavar="RECIPE", help="one of the recipes below")
    train.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the options of the recipe")
    generate = command("generate", run_generate, parents=[shared])
    prompt = generate.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt_file", metavar="FILE", help="a file with the text; a newline at its end is dropped")
    generate.add_argument("--no_bos", action="store_true", help="do not put the bos token before the prompt")
    generate.add_argument("--no_cache", action="store_true", help="recompute all tokens for every new one")
    generate.add_argument("--num_return_sequences", type=positive, default=1, metavar="N", help="number of texts")
    chat = command("chat", run_chat, parents=[shared])
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    add = command("export", run_export).add_argument
    add("--model", required=True, metavar="SOURCE", help="a checkpoint directory, or a name on the Hub")
    add("--output", required=True, metavar="DIRECTORY", help="where to write")
    add("--overwrite", action="store_true", help="write into a directory that is not empty; replace the model in it")
    add("--name", help="user/name on the Hub, for the model card; default: the name of DIRECTORY")
    add("--language", nargs="+", metavar="CODE", help="languages of the texts: en, de, …")
    add("--license", metavar="ID", help="license of the weights: apache-2.0, cc-by-4.0, …")
    add("--datasets", nargs="+", metavar="NAME", help="data sets on the Hub that it was trained on")
    add("--base_model", metavar="NAME", help="model on the Hub that it was trained from")
    add("--tags", nargs="+", metavar="TAG", help="tags for the model card")
    add("--dataset_name", metavar="TEXT", help="what it was evaluated on, in words")
    add = command("convert", run_convert).add_argument
    add("source", metavar="SOURCE", help="a checkpoint directory, or a file of weights")
    add("output", metavar="OUTPUT", help="a directory that is empty or does not exist yet")
    kinds = ("builtin", "reformer-pytorch", "trax", "hf_reformer")
    add("--from", dest="kind", choices=kinds, help="format of SOURCE; detected if possible")
    add("--to", choices=("hf_reformer", "builtin"), default="hf_reformer", help="format of OUTPUT (hf_reformer)")
    add("--head", metavar="CLASS", help="ReformerForCausalLM, …; default: the class that SOURCE was saved from")
    add("--attention_mode", choices=("chunk", "window"), help="window: convert a model of chunk mode to window mode")
    add("--fields", metavar="JSON", help="an object or its file: config fields that SOURCE lacks, or for window mode")
    add("--no_lm_bias", action="store_true", help="set the head's bias to 0, as transformers 5.0 to 5.23 compute")
    command("env", run_env)
    return parser


def one_line(error: BaseException) -> str:
    """The message of an error in one line; for one that is not foreseen, with its type and where it was raised."""
    text = " ".join(str(error).split())
    if not isinstance(error, ImportError | OSError | ValueError | SystemExit):
        frames = traceback.extract_tb(error.__traceback__)
        text = f"{type(error).__name__}: {text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    return "hf-reformer: " + text.split(" Model type should be one of")[0]  # hundreds


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. The exit status is 2 for an error, 130 for ctrl-C.

    TRANSFORMERS_VERBOSITY=debug shows where an error was raised.
    """
    prepare_streams()
    try:
        try:
            args = make_parser().parse_args(argv)
            args.run(args)
        finally:
            finish_output()
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        discard(sys.stdout)
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        if not isinstance(end.code, str):
            raise
        print(one_line(end), file=sys.stderr)
        return 2
    except Exception as error:
        from transformers.utils import logging

        logging.get_logger("transformers.hf_reformer").debug("", exc_info=True)
        print(one_line(error), file=sys.stderr)
        return 2
    return 0
