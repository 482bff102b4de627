"""An extension for the API reference: removes the markup of types in transformers' style, (`int`, defaults to `0`)."""

import re
from typing import Any

import griffe

HEAD = re.compile(r"^( +[\w, ]+ \()(.+)(\):.*)$", flags=re.MULTILINE)


class PlainTypes(griffe.Extension):
    def on_class(self, *, cls: Any, **kwargs: Any) -> None:
        if cls.docstring is not None:
            cls.docstring.value = HEAD.sub(lambda x: x[1] + re.sub("[`*]", "", x[2]) + x[3], cls.docstring.value)
