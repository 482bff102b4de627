"""Handling of standard streams that may be closed, broken, full, or in an encoding that lacks characters."""

import io
import os
import sys
from contextlib import suppress
from typing import Any


def prepare_streams() -> None:
    """Make stdin and the outputs work in any encoding, and closed streams harmless.

    Characters missing from an output's encoding are escaped, such as \\xe9. The descriptor of a closed stream is
    reserved: otherwise a file opened later would get it and receive what libraries print.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(io.UnsupportedOperation):  # stdin has already been read from
                stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "backslashreplace")
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def discard(stream: Any) -> None:
    """Discard what the stream has buffered, and everything written later."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def finish_output() -> None:
    """Flush stdout now: an error during Python's shutdown could not be handled."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        discard(sys.stdout)
        raise


class Lasting:
    """A stream that discards what cannot be written, warning once, so that a long run survives its terminal."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write to the stream; after an error, discard all output."""
        try:
            return self.stream.write(text)
        except OSError as error:
            return self._discard(error, len(text))

    def flush(self) -> None:
        """Flush the stream; after an error, discard all output."""
        try:
            self.stream.flush()
        except OSError as error:
            self._discard(error, 0)

    def _discard(self, error: OSError, size: int) -> int:
        discard(self.stream)
        print(f"hf-reformer: Output to {self.stream.name} has stopped: {error}.", file=sys.stderr)
        return size
