"""Standard streams that may be closed, broken, full, or in an encoding that lacks characters."""

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
    """Discard what the stream still buffers, and everything written later."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def finish_output() -> None:
    """Flush stdout now: while Python shuts down, an error could not be handled."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        discard(sys.stdout)
        raise


class Lasting:
    """A stream that discards what cannot be written, and says so once, so that a long run survives its terminal."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write to the stream as long as possible."""
        try:
            return self.stream.write(text)
        except OSError as error:
            return self._discard(error, len(text))

    def flush(self) -> None:
        """Flush the stream as long as possible."""
        try:
            self.stream.flush()
        except OSError as error:
            self._discard(error, 0)

    def _discard(self, error: OSError, size: int) -> int:
        discard(self.stream)
        print(f"hf-reformer: Output to {self.stream.name} has stopped: {error}.", file=sys.stderr)
        return size
