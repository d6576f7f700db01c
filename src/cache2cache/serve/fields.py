"""What a field of a request may hold, whatever it is for."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

_NAME = 256
"""Longest name of a model, in characters."""


class Body(BaseModel):
    """JSON of a client."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {}
    """Fields of the API that are not served, with values that ask for nothing; null is one for all of them."""

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if name not in cls.neutral or not (value is None or value in cls.neutral[name])
        }


def _joined(content: Any) -> Any:
    """Parts of text, one per line, as one text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            raise PydanticCustomError("text_part", 'parts of a content must be {"type": "text", "text": "…"}')
        if not isinstance(part["text"], str):
            raise PydanticCustomError("text_part", "the text of a part must be a string")
    return "\n".join(part["text"] for part in content)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _whole(text: str) -> str:
    """JSON can spell halves of surrogate pairs, which are no characters and have no tokens."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("unicode", "half of a surrogate pair is no text")
    return text


def _sharer(value: Any) -> Any:
    if type(value) is not int and not (type(value) is str and len(value) <= _NAME):
        raise PydanticCustomError("sharer", "a sharer is named by its id or its index")
    return value


Name = Annotated[str, Field(max_length=_NAME)]
Text = Annotated[str, Field(min_length=1), AfterValidator(_whole)]
Stop = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_whole)]
Texts = Annotated[list[Text], Field(min_length=1), BeforeValidator(_listed, json_schema_input_type=str | list[str])]
Stops = Annotated[list[Stop], Field(max_length=16), BeforeValidator(_listed, json_schema_input_type=str | list[str])]
Content = Annotated[
    str, AfterValidator(_whole), BeforeValidator(_joined, json_schema_input_type=str | list[dict[str, str]])
]
Sharer = Annotated[str | int, PlainValidator(_sharer, json_schema_input_type=str | int)]
