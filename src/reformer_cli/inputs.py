"""Inputs of commands (texts, files, numbers), and a check that there is an output."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

LONGEST = 2**26  # characters of a prompt


def json_fields(text: str | None) -> dict[str, Any] | None:
    """Read the fields of a JSON object, given as text or as a file name."""
    if text is None:
        return None
    try:
        fields = json.loads(text if text.lstrip()[:1] in ("{", "[") else Path(text).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--fields is not valid JSON: {error}.") from error
    except OSError as error:
        raise ValueError(f"--fields {text} is neither a JSON object nor a file that can be read.") from error
    if not isinstance(fields, dict):
        raise ValueError('--fields must be a JSON object, such as {"num_buckets": 64}.')
    return fields


def read_prompt(args: argparse.Namespace) -> str:
    """Read the prompt. In a file or stdin, \\r\\n becomes \\n; a byte order mark and a final newline are dropped."""
    name = args.prompt_file or "The prompt"
    if args.prompt is not None:
        return checked(args.prompt, name)
    if args.prompt_file is not None:
        with open(args.prompt_file, encoding="utf-8", errors="surrogateescape", newline="") as file:
            text = file.read(LONGEST + 4)  # leaves room for a byte order mark and a line end
    elif sys.stdin is None:
        raise ValueError("stdin is closed. Give the text by --prompt or --prompt_file.")
    else:
        text = sys.stdin.read(LONGEST + 4)
    return checked(text.removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n"), name)


def checked(text: str, name: str) -> str:
    """Check a text from the user. Bytes that Python could not decode in the locale's encoding are decoded as UTF-8.

    Raises:
        ValueError: the bytes are not UTF-8, or the text is too long for a prompt.
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
    """Raise ValueError if stdout is closed; for commands whose result is text."""
    if sys.stdout is None:
        raise ValueError("stdout is closed, and the text would be lost. Redirect it to a file, or to /dev/null.")


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)
