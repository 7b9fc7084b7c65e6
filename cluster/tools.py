"""Tools, the choice among them and the reply's format, as OpenAI's clients write them. Knows nothing of text or grammars.

A function is kept as the object that the client sent: the prompt shows its keys in the client's order.
"""

import re
from typing import Annotated, Any, Literal

import msgspec

from cluster.errors import InvalidRequest, echo

MAX_TOOLS = 128  # OpenAI's limit
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A function the model may call. `check` has seen to it that the properties are what they say."""

    type: Literal["function"]
    function: dict[str, Any]

    @property
    def name(self) -> str:
        name: str = self.function["name"]
        return name

    @property
    def parameters(self) -> dict[str, Any]:
        """A JSON schema of the arguments; left out: a function without arguments."""
        return self.function.get("parameters") or {"type": "object", "properties": {}}

    @property
    def strict(self) -> bool:
        """Whether arguments must follow the schema to the letter."""
        return self.function.get("strict") is True


class FunctionName(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str


class NamedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["auto", "none", "required"] | NamedTool


class FunctionCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    arguments: str  # a JSON object, as text


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A call that the model made, in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    schema: dict[str, Any] = {}
    description: str | None = None
    strict: bool | None = None


class TextFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"
):
    pass


class JsonSchemaFormat(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"
):
    json_schema: JsonSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat
Tools = Annotated[list[Tool], msgspec.Meta(max_length=MAX_TOOLS)]


def must_call(choice: ToolChoice | None) -> bool:
    """Whether the answer has to be a call."""
    return isinstance(choice, NamedTool) or choice == "required"


def check_tools(tools: list[Tool], choice: ToolChoice | None) -> None:
    """Raises InvalidRequest naming the field where a tool is malformed or the choice names none of them."""
    names: set[str] = set()
    for index, tool in enumerate(tools):
        where = f"tools[{index}].function"
        name = tool.function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise _invalid(f"{where}.name", "must be 1 to 64 letters, digits, _ or -")
        if name in names:
            raise _invalid(f"{where}.name", f"{echo(name)} is there twice")
        names.add(name)
        for key, kind in (("description", str), ("parameters", dict), ("strict", bool)):
            value = tool.function.get(key)
            if value is not None and not isinstance(value, kind):
                raise _invalid(f"{where}.{key}", f"must be {_JSON_NAMES[kind]}")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise _invalid("tool_choice.function.name", f"{echo(choice.function.name)} is none of the tools")
    if not tools and choice not in (None, "none", "auto"):
        raise _invalid("tool_choice", "is allowed only where there are tools")


_JSON_NAMES = {str: "a string", dict: "an object", bool: "true or false"}


def _invalid(param: str, sentence: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {sentence}", param=param)
