"""Conversations: reading messages from tables, a chat template, and training windows."""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..models.losses import IGNORE
from .packing import cut_windows
from .tables import read_column

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

Messages = list[dict[str, str]]  # each with `role` and `content`

ROLES = ("system", "user", "assistant")
_SHARE_GPT = {"human": "user", "gpt": "assistant"}

# A line with the role, then the message and the eos token. The assistant's messages are marked, as trl requires.
CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ (message['content'] | trim) + eos_token }}{% endgeneration %}"
    "{% else %}{{ (message['content'] | trim) + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)


def set_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer `CHAT_TEMPLATE` unless it has a chat template.

    Raises:
        ValueError: it has no eos token, or a template that does not mark the assistant's messages.
    """
    if tokenizer.chat_template is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "The tokenizer has no eos token to end what is said. Give it one: "
                '`tokenizer.add_special_tokens({"eos_token": "</s>"})`, then save it.'
            )
        tokenizer.chat_template = CHAT_TEMPLATE
    elif "endgeneration" not in str(tokenizer.chat_template):
        raise ValueError(
            "The tokenizer's chat template does not mark the assistant's messages, and only those are trained on. "
            "Put {% generation %} … {% endgeneration %} around them, including their end marks, and save the "
            "tokenizer; or set its chat_template to None to use ours."
        )


def read_conversations(
    rows: "Dataset", column: str, split: str, tokenizer_words: Iterable[str] = ()
) -> list[Messages]:
    """Read conversations from a table with a list of messages per row; ShareGPT's `from` and `value` are read, too.

    Messages without content are left out, and consecutive messages of the same role are joined. Conversations in which
    the assistant says nothing are left out. Warnings report all of these.

    Args:
        tokenizer_words: special tokens, which no message may contain.

    Raises:
        ValueError: a cell contains no messages or a special token, a role is unknown, or a system message is not the
            first; the error names the row. Or there is no conversation.
    """
    found, empty, joined, silent = [], list[int](), list[int](), list[int]()
    for row, cell in enumerate(read_column(rows, column)):
        where = f"Row {row} of the {split} data"
        messages: Messages = []
        for number, (role, content) in enumerate(_messages(cell, column, where)):
            if role not in ROLES:
                raise ValueError(
                    f"{where}, message {number}: the role {role!r} is none of {', '.join(ROLES)}. Rename it."
                )
            if word := next((word for word in tokenizer_words if word in content), None):
                raise ValueError(f"{where}, message {number} spells {word}, a special token. Write it in another way.")
            if not content:
                empty.append(row)
            elif messages and messages[-1]["role"] == role:
                messages[-1]["content"] += "\n" + content
                joined.append(row)
            elif role == "system" and messages:
                raise ValueError(
                    f"{where}, message {number} is the system's, which can only be the first one. Move it."
                )
            else:
                messages.append({"role": role, "content": content})
        if any(message["role"] == "assistant" for message in messages):
            found.append(messages)
        else:
            silent.append(row)
    for some, what in (
        (empty, "messages without content are left out"),
        (joined, "messages follow another one of the same role and are joined to it"),
        (silent, "conversations without a message of the assistant are left out"),
    ):
        if some:
            logger.warning(f"{len(some)} {what} ({split} data; the first one is in row {some[0]}).")
    if not found:
        raise ValueError(f"The assistant says nothing in the {split} data. Its messages have the role `assistant`.")
    return found


def _messages(cell: Any, column: str, where: str) -> list[tuple[str, str]]:
    """Return role and content of the messages of a cell, without surrounding white space."""
    if isinstance(cell, str):  # from a csv file
        with suppress(ValueError):
            cell = json.loads(cell)
    try:
        if not isinstance(cell, list) or not cell:
            raise TypeError
        pairs = []
        for message in cell:
            share_gpt = "role" not in message
            role, content = message["from" if share_gpt else "role"], message.get("value" if share_gpt else "content")
            if not isinstance(role, str) or not isinstance(content, str | None):
                raise TypeError
            pairs.append((_SHARE_GPT.get(role, role), (content or "").strip()))
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f'{where} has {str(cell)[:80]!r} as `{column}`, where [{{"role": "user", "content": "Hello"}}, …] is '
            "expected. Contents are texts."
        ) from None
    return pairs


def beginnings(conversations: Sequence[Messages]) -> list[tuple[tuple[str, str], ...]]:
    """Return, for every conversation, the shortest conversation it begins with: parts of one dialogue share it."""
    whole = [tuple((message["role"], message["content"]) for message in messages) for messages in conversations]
    known = set(whole)
    return [next(one[:size] for size in range(1, len(one) + 1) if one[:size] in known) for one in whole]


def encode_conversation(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, and which are the assistant's: its messages and their end tokens."""
    encoded: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(encoded["input_ids"]), [bool(x) for x in encoded["assistant_masks"]]


def conversation_windows(
    conversations: Sequence[Messages], tokenizer: PreTrainedTokenizerBase, length: int
) -> dict[str, list]:
    """Make columns `input_ids` and `labels` of windows in which every token of the assistant is a target once.

    Conversations of up to `length` tokens are one window; later windows start with half a window of earlier tokens.
    """
    windows: dict[str, list] = {"input_ids": [], "labels": []}
    for messages in conversations:
        ids, said = encode_conversation(messages, tokenizer)
        targets = [token if own else IGNORE for token, own in zip(ids, said, strict=True)]
        for window, labels in cut_windows(ids, length, length // 2, targets):
            if any(label != IGNORE for label in labels):
                windows["input_ids"].append(window)
                windows["labels"].append(labels)
    return windows
