"""The chat format of DeepSeek-V3.2: messages to pieces of a prompt, tool calls in DSML. Knows nothing of HTTP or token ids.

Source: encoding_dsv32.py of the model's repository. Reasoning is kept from the last user message on, so between the calls
of one answer; earlier reasoning is dropped, as the model was trained.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from cluster.chat_encoding import (
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    THINK,
    THINK_END,
    USER,
    Message,
    Piece,
    in_order,
    misplaced,
    plain,
    template,
    to_json,
)
from cluster.tools import JsonSchemaFormat, ResponseFormat, Tool, ToolCall

_TOOLS = f"""\
## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{DSML}function_calls>" block like the following as part of your reply to the user:
<{DSML}function_calls>
<{DSML}invoke name="$FUNCTION_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$FUNCTION_NAME2">
...
</{DSML}invoke>
</{DSML}function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, \
while lists and objects should use JSON format. \
The "string" attribute should be set to "true" for string type parameters and "false" for other types \
(numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
Here is an example:

<{DSML}function_calls>
...
</{DSML}function_calls>

<function_results>
...
</function_results>

{THINK}...thinking about results{THINK_END}

Here are the functions available in JSONSchema format:
<functions>
"""
_RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"

_Pieces = list[Piece]


def render(
    messages: Sequence[Message],
    *,
    thinking: bool,
    tools: Sequence[Tool] = (),
    response_format: ResponseFormat | None = None,
) -> _Pieces:
    """The prompt after which the model writes the next assistant message. There is at least one message.

    Tools and the reply's schema stand after the leading system messages, or in a developer's message that comes first.

    Raises InvalidRequest naming messages[i] where the order cannot be written in this format.
    """
    messages = in_order(messages, system_anywhere=False)
    last_user = max(i for i, message in enumerate(messages) if message.role in ("user", "developer"))
    blocks = _blocks(tools, response_format)
    place = _place_of_blocks(messages)
    pieces = [Piece(BOS, True)]
    if place is None:
        pieces += blocks
    for index, message in enumerate(messages):
        thinks = thinking and index >= last_user
        if message.role == "system":
            pieces += [plain(message.text), *(blocks if index == place else [])]
        elif message.role == "developer":
            if thinking and index < last_user:
                rule = "where the model thinks, a developer's message must be the last before the reply"
                raise misplaced(f"messages[{index}].role", rule)
            asked = [
                *(blocks if index == place else []),
                plain(f"\n\n# The user's message is: {message.text}"),
            ]
            pieces += _user(asked, thinks)
        elif message.role == "user":
            pieces += _user([plain(message.text)], thinks)
        elif message.role == "tool":
            first = messages[index - 1].role != "tool"
            last = index + 1 == len(messages) or messages[index + 1].role != "tool"
            pieces += _result(message.text, thinks, first=first, last=last)
        else:
            pieces += _assistant(message, f"messages[{index}]", thinks)
    return [piece for piece in pieces if piece.text]


def _place_of_blocks(messages: Sequence[Message]) -> int | None:
    """The message that tools belong to; None: a system message of their own, without text, before all others."""
    if messages[0].role == "developer":
        return 0
    leading = next(i for i, message in enumerate(messages) if message.role != "system")
    return leading - 1 if leading else None


def _blocks(tools: Sequence[Tool], response_format: ResponseFormat | None) -> _Pieces:
    pieces = []
    if tools:
        functions = [to_json(tool.function, f"tools[{i}].function") for i, tool in enumerate(tools)]
        pieces += template(f"\n\n{_TOOLS}")
        pieces.append(plain("\n".join(functions) + "\n</functions>\n"))
    if isinstance(response_format, JsonSchemaFormat):
        schema = to_json(response_format.json_schema.schema, "response_format.json_schema.schema")
        pieces.append(plain(f"\n\n{_RESPONSE_FORMAT}{schema}"))
    return pieces


def _user(content: _Pieces, thinks: bool) -> _Pieces:
    return [Piece(USER, True), *content, Piece(ASSISTANT, True), Piece(THINK if thinks else THINK_END, True)]


def _assistant(message: Message, where: str, thinks: bool) -> _Pieces:
    pieces = []
    if thinks:
        if not (message.reasoning_content or message.tool_calls):
            raise misplaced(f"{where}.reasoning_content", "is required where the model thinks")
        pieces += [plain(message.reasoning_content or ""), Piece(THINK_END, True)]
    pieces.append(plain(message.text))
    if message.tool_calls:
        pieces += template(f"\n\n<{DSML}function_calls>\n")
        for number, call in enumerate(message.tool_calls):
            pieces += _call(call, f"{where}.tool_calls[{number}].function.arguments")
        pieces += template(f"</{DSML}function_calls>")
    return pieces if message.prefix else [*pieces, Piece(EOS, True)]


def _call(call: ToolCall, where: str) -> _Pieces:
    pieces = [*template(f"<{DSML}invoke"), plain(f' name="{call.function.name}">\n')]
    for number, (name, value) in enumerate(_arguments(call.function.arguments, where).items()):
        is_string = isinstance(value, str)
        written = value if is_string else to_json(value, where)
        attributes = f' name="{name}" string="{"true" if is_string else "false"}">'
        pieces += template(("\n" if number else "") + f"<{DSML}parameter")
        pieces += [plain(attributes + written), *template(f"</{DSML}parameter>")]
    return [*pieces, *template(f"\n</{DSML}invoke>\n")]


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise misplaced(where, "must be a JSON object")
    return arguments


def _result(text: str, thinks: bool, *, first: bool, last: bool) -> _Pieces:
    pieces = [plain(("\n\n<function_results>" if first else "") + f"\n<result>{text}</result>")]
    if last:
        pieces += [plain("\n</function_results>\n\n"), Piece(THINK if thinks else THINK_END, True)]
    return pieces
