"""The command line: `hf-reformer train`, `generate`, `chat`, `serve`, `export` and the other commands.

Each command imports what it needs in its `run_…` function.
"""

import argparse
import inspect
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from .inputs import check_stdout, checked, json_fields, positive, read_prompt
from .measuring import PLOTS, run_bench, run_memory, run_plot
from .streams import Lasting, discard, finish_output, prepare_streams

SPINS = "10000"  # about half a millisecond
COLD = 1e-5  # below this temperature only the most likely token is left, and logits divided by it may overflow
LOST_PEER = (
    "Another process of this run has ended or cannot be reached, so this one ends, too. The last output of the other "
    "process says why. Resume from the newest checkpoint with --resume_from_checkpoint last. (Found: {})"
)
SAMPLING = ("temperature", "top_p", "top_k")
RECIPES = {  # each is a module of `hf_reformer.recipes`
    "classification": "label texts or pairs of texts, or predict a number for them",
    "language-model": "causal and masked language models, evaluated in bits per byte",
    "seq2seq": "translation, summarization and other text-to-text tasks",
    "question-answering": "find the answer to a question in a document",
    "token-classification": "label every word: names, parts of speech",
    "multiple-choice": "choose the correct one of several endings or answers",
    "recommendation": "recommend the next item to every user",
    "chat": "answer in conversations; talk to the model with `hf-reformer chat`",
    "speech-recognition": "transcribe speech, in recordings of any length",
    "audio-classification": "label recordings: words, sounds, speakers",
    "image-classification": "label images, by their pixels or patches",
    "image-generation": "generate images pixel by pixel, evaluated in bits per dimension",
    "forecasting": "forecast time series, one or several at once, and vehicle trajectories",
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
        except BrokenPipeError as error:  # not from stdout, which `Lasting` protects
            raise RuntimeError(f"A pipe between processes broke: {error}") from error


def run_demo(args: argparse.Namespace) -> None:
    """Train a classifier on the source files of installed Python packages and use it: no download, a few minutes.

    Short for `hf-reformer train classification --demo`, which also takes options; writes to runs/demo.
    """
    args.recipe, args.arguments = "classification", ["--demo"]
    run_train(args)


def load(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Load the model and its tokenizer, and return both with the options for `text_generation.generate`."""
    from .text_generation import load

    check_stdout()
    for name, most in {"temperature": sys.float_info.max, "top_p": 1, "top_k": sys.maxsize}.items():
        value = getattr(args, name)
        if value is not None and not 0 <= value <= most:  # rejects NaN, too
            raise ValueError(f"--{name} {value} is not between 0 and {most}.")
    greedy = args.greedy or (args.temperature is not None and args.temperature < COLD)
    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if unused := [name for name in sampling if args.greedy or (name != "temperature" and greedy)]:
        raise ValueError(f"--greedy always takes the most likely token. Leave out --{', --'.join(unused)}.")
    if args.seed is not None:
        from transformers import set_seed  # imports half of the library

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

    The tokenizer's BOS token, if it has one, is prepended to the prompt, as `hf-reformer train language-model`
    prepends it to each document. Like EOS, it ends the new text.
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
    """Talk to a model, one line per turn, using its tokenizer's chat template.

    /reset forgets all turns, /save FILE writes them as JSON lines, /quit or Ctrl-D ends the chat.
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
                raise ValueError(f"{command} is not a command. The commands are /reset, /save FILE and /quit.")
            elif line:
                conversation.answer(checked(line, "The line"))
        except BrokenPipeError:
            raise
        except Exception as error:
            if not terminal:
                raise
            print(one_line(error), file=sys.stderr)


def run_serve(args: argparse.Namespace) -> None:
    """Serve a causal language model with transformers' own OpenAI-compatible server.

    OpenAI clients find it at http://HOST:PORT/v1: chat completions, completions and responses, streamed or not. It
    has neither authentication nor encryption: give others access only through a proxy that provides both.
    """
    try:
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"`hf-reformer serve` needs `{error.name}`. In a clone: `pip install -e '.[serve]'`."
        ) from error
    from .serving import make_server

    names = ("device", "dtype", "trust_remote_code", "conversations", "enable_cors", "log_level")
    make_server(args.model, args.host, args.port, **{name: getattr(args, name) for name in names}).run()


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
    """Convert an old checkpoint to this package's Reformer, or to that of transformers.

    Prints the differences between the two models, one per line.
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
        print(f"There was no tokenizer. Save one to {folder} with `tokenizer.save_pretrained`: pipelines need it.")


def run_env(args: argparse.Namespace) -> None:
    """Print versions, devices and their attention backends, for bug reports.

    On a GPU whose kernels have not been used yet, the kernels are checked first, which takes a minute or two.
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
        "HF_REFORMER_BACKEND": f"{chosen}, which overrides these" if chosen else "not set",
    }.items():
        print(f"{name}: {value}")


def add_text(parser: argparse.ArgumentParser, name: str, help: str) -> None:
    """Add the options --name and --name_file, for `read_prompt`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(f"--{name}", dest="prompt", metavar="TEXT", help=help)
    file_help = "a file with the text; a final newline is dropped"
    group.add_argument(f"--{name}_file", dest="prompt_file", metavar="FILE", help=file_help)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser for all commands; each sets `run` to the function that runs it."""
    loading = argparse.ArgumentParser(add_help=False)
    add = loading.add_argument
    add("--model", required=True, metavar="PATH", help="directory or Hub name of a causal language model")
    add("--device", default="auto", help="cpu, cuda:1, …; auto: an accelerator if there is one, else the CPU")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", default="auto", choices=dtypes, help="dtype of the weights; auto: as saved")
    add("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--max_new_tokens", type=positive, default=256, metavar="N", help="at most this many tokens (256)")
    add("--temperature", type=float, metavar="T", help="divides the logits; 0 is --greedy; default: the model's own")
    add("--top_p", type=float, metavar="P", help="sample from the most likely tokens whose probabilities sum to P")
    add("--top_k", type=int, metavar="K", help="sample from the K most likely tokens; 0: from all")
    add("--greedy", action="store_true", help="always take the most likely token instead of sampling")
    add("--seed", type=int, metavar="S", help="makes sampling reproducible")
    add("--prefill_chunk_size", type=positive, metavar="N", help="read the prompt in chunks of N tokens")
    add("--no_stream", action="store_true", help="print the text only when it is complete")

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
    command("demo", run_demo)
    generate = command("generate", run_generate, parents=[loading, shared])
    add_text(generate, "prompt", "the text to continue")
    generate.add_argument("--no_bos", action="store_true", help="do not prepend the BOS token to the prompt")
    generate.add_argument("--no_cache", action="store_true", help="recompute all tokens for every new one")
    generate.add_argument("--num_return_sequences", type=positive, default=1, metavar="N", help="number of texts")
    chat = command("chat", run_chat, parents=[loading, shared])
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    add = command("serve", run_serve, parents=[loading]).add_argument
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only; 0.0.0.0: all)")
    add("--port", type=int, default=8000, help="port to listen on (8000)")
    add("--conversations", type=int, default=4, metavar="N", help="number of caches to keep between requests (4)")
    add("--enable_cors", action="store_true", help="let web pages from any site send requests")
    levels = ("error", "warning", "info")
    add("--log_level", default="info", choices=levels, help="info: the address and every request (info)")
    add = command("export", run_export).add_argument
    add("--model", required=True, metavar="SOURCE", help="a checkpoint directory, or a name on the Hub")
    add("--output", required=True, metavar="DIRECTORY", help="where to write")
    add("--overwrite", action="store_true", help="write into a non-empty directory, replacing the model in it")
    add("--name", help="user/name on the Hub, for the model card; default: the name of DIRECTORY")
    add("--language", nargs="+", metavar="CODE", help="languages of the texts: en, de, …")
    add("--license", metavar="ID", help="license of the weights: apache-2.0, cc-by-4.0, …")
    add("--datasets", nargs="+", metavar="NAME", help="datasets on the Hub that the model was trained on")
    add("--base_model", metavar="NAME", help="model on the Hub that this one was fine-tuned from")
    add("--tags", nargs="+", metavar="TAG", help="tags for the model card")
    add("--dataset_name", metavar="TEXT", help="what the model was evaluated on, in words")
    add = command("convert", run_convert).add_argument
    add("source", metavar="SOURCE", help="a checkpoint directory, or a weights file")
    add("output", metavar="OUTPUT", help="an empty directory, or one that does not exist yet")
    kinds = ("builtin", "reformer-pytorch", "trax", "hf_reformer")
    add("--from", dest="kind", choices=kinds, help="format of SOURCE; detected if possible")
    add("--to", choices=("hf_reformer", "builtin"), default="hf_reformer", help="format of OUTPUT (hf_reformer)")
    add("--head", metavar="CLASS", help="ReformerForCausalLM, …; default: the class that saved SOURCE")
    add("--attention_mode", choices=("chunk", "window"), help="window: convert a chunk-mode model to window mode")
    add("--fields", metavar="JSON", help="object or file name: config fields that SOURCE lacks, or for window mode")
    add("--no_lm_bias", action="store_true", help="set the head's bias to 0, like transformers 5.0 to 5.23")
    sizes = argparse.ArgumentParser(add_help=False)
    add = sizes.add_argument
    add("--length", required=True, nargs="+", type=positive, metavar="N", help="tokens per sequence")
    add("--batch_size", type=positive, default=1, metavar="N", help="number of sequences (1)")
    add("--model", metavar="PATH", help="a checkpoint directory, or a name on the Hub; default: a new config")
    add("--fields", metavar="JSON", help='object or file name: config fields, such as {"hidden_size": 512}')
    add("--head", metavar="CLASS", help="ReformerForCausalLM, …; default: the class named in the config")
    add = command("memory", run_memory, parents=[sizes]).add_argument
    add("--inference", action="store_true", help="a forward pass instead of a training step")
    add("--use_cache", action="store_true", help="a forward pass that prefills a cache")
    add("--dtype", choices=dtypes[1:], default="float32", help="dtype of the weights (float32)")
    add("--bf16", action="store_true", help="compute in bfloat16 by autocast, like --bf16 in training")
    add("--optimizer_states", type=int, choices=range(4), default=2, help="numbers per weight (2: AdamW)")
    add = command("bench", run_bench, parents=[sizes]).add_argument
    add("--repeats", type=positive, default=3, metavar="N", help="median of this many steps, after a warm-up (3)")
    add("--no_baseline", action="store_true", help="skip exact attention, whose time is quadratic in the length")
    plot = command("plot", run_plot)
    add_text(plot, "text", "the text to look at")
    add = plot.add_argument
    add("--model", required=True, metavar="PATH", help="a checkpoint directory, or a name on the Hub")
    add("--output", required=True, metavar="FILE", help="the image file: .png, .svg or .pdf")
    add("--kind", choices=PLOTS, default="pairs", help="what to plot (pairs)")
    add("--layer", type=int, metavar="N", help="number of the layer; default: the first LSH layer, else 0")
    add("--head", type=int, default=0, metavar="N", help="number of the head (0)")
    add("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    command("env", run_env)
    return parser


def one_line(error: BaseException) -> str:
    """Format an error message on one line; for an unexpected error, with its type and where it was raised."""
    text = " ".join(str(error).split())
    if not isinstance(error, ImportError | OSError | ValueError | SystemExit):
        frames = traceback.extract_tb(error.__traceback__)
        text = f"{type(error).__name__}: {text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    return "hf-reformer: " + text.split(" Model type should be one of")[0]  # hundreds of them


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 2 after an error, 130 after Ctrl-C.

    TRANSFORMERS_VERBOSITY=debug shows where an error was raised.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        # GNU OpenMP threads busy-wait for each other, by default for several milliseconds. If other programs occupy
        # the cores, most of the time is spent there, and training takes up to ten times as long.
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
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
