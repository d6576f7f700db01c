"""Response likelihood on chats: nats per token of the reference response. Nothing is generated.

The chats are databricks-dolly-15k, which has no test split. A fixed twentieth is held out here, by a hash of the user's
message, so that the slice does not depend on the order of the file and equal messages fall on the same side. A fuser that
was trained on Dolly must have left these rows out: `held_out` tells which they are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from cache2cache.errors import ConversationError, DataError
from cache2cache.evaluate.items import Answer, Item
from cache2cache.evaluate.tasks.base import Kind, Row, Scored, Source, Split, Task, checked, nats_per_token
from cache2cache.text.chat import check
from cache2cache.types import Message

_SHARE = 20
"""One message in so many is held out."""


class ChatRow(BaseModel):
    """One conversation, ending with the reference response."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    messages: Any
    """See `text.chat.check`."""
    category: str | None = None


@dataclass(frozen=True)
class ChatTask(Task):
    """Chats, scored by the likelihood of their last message, which is the assistant's."""

    kind: ClassVar[Kind] = "likelihood"
    metrics: ClassVar[tuple[str, ...]] = ("nats",)

    def item(self, row: Row) -> Item:
        """See `Task.item`."""
        chat = checked(ChatRow, row, "chat")
        try:
            check(chat.messages)
        except ConversationError as error:
            raise DataError("not a chat row", got=error) from error
        *asked, response = [Message(role=m["role"], content=m["content"]) for m in chat.messages]
        if response["role"] != "assistant" or not asked or asked[-1]["role"] != "user":
            roles = ", ".join(message["role"] for message in chat.messages)
            raise DataError(
                "a chat does not end with a question and its answer", got=roles, allowed="…, user, assistant"
            )
        if not response["content"].strip():
            raise DataError("the reference response of a chat is empty")
        return Item(
            task=self.name,
            id=chat.id,
            subject=chat.category or self.name,
            wordings={"plain": asked, "bare": asked},
            topic=asked[-1]["content"],
            target=response["content"],
            max_new_tokens=0,
            one_line=False,
        )

    def score(self, item: Item, answer: Answer) -> Scored:
        """See `Task.score`."""
        return Scored(None, {"nats": nats_per_token(answer)})


@dataclass(frozen=True)
class Dolly(ChatTask):
    """Dolly's layout on the hub, and its held-out slice."""

    def from_hub(self, row: Row, config: str) -> dict[str, Any]:
        """See `Task.from_hub`. The user's message is the instruction and, after a blank line, the context if any."""
        asked = "\n\n".join(part for part in (row["instruction"], row["context"]) if part.strip())
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["response"]}]
        return {"messages": messages, "category": row["category"]}

    def reason_to_drop(self, row: Row, split: Split) -> str | None:
        """See `Task.reason_to_drop`."""
        if held_out(row["messages"][-2]["content"]) == (split == "test"):
            return None
        return "kept for training" if split == "test" else "held out for the test"


def held_out(message: str) -> bool:
    """Whether a user's message of Dolly is in the slice that is asked. Its white space does not matter."""
    digest = hashlib.sha256(" ".join(message.split()).encode()).digest()
    return int.from_bytes(digest[:8], "big") % _SHARE == 0


_SOURCE = Source(
    "dolly_15k/train",
    "databricks/databricks-dolly-15k",
    ("default",),
    "train",
    "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a",
)

TASK = Dolly(name="chats", title="Chats (Dolly)", licence="CC BY-SA 3.0", sources={"test": _SOURCE, "train": _SOURCE})
