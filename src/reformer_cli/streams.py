"""Standard streams that may be closed, broken, full, or in an encoding that lacks characters."""

import io
import os
import sys
from contextlib import suppress
from typing import Any


def prepare_streams() -> None:
    """Make stdin and the outputs work in any encoding, and closed ones harmless.

    A character that the encoding of an output lacks is written as its number, such as \\xe9. The number of a closed
    stream is taken: a file that is opened later would get it, and in the file would stand what libraries print.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(io.UnsupportedOperation):  # something has been read from stdin
                stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "backslashreplace")
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def discard(stream: Any) -> None:
    """Write what the stream still holds, and what follows, to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def finish_output() -> None:
    """Write what stdout still holds now: while Python shuts down, an error could not be handled."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        discard(sys.stdout)
        raise


class Lasting:
    """A stream that discards what cannot be written, and says so once, so that a long run outlives its terminal."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write to the stream while it can be written to."""
        try:
            return self.stream.write(text)
        except OSError as error:
            return self._discard(error, len(text))

    def flush(self) -> None:
        """Flush the stream while it can be written to."""
        try:
            self.stream.flush()
        except OSError as error:
            self._discard(error, 0)

    def _discard(self, error: OSError, size: int) -> int:
        discard(self.stream)
        print(f"hf-reformer: {self.stream.name} is not written to any more: {error}.", file=sys.stderr)
        return size
