"""The chat format of DeepSeek-V3.2-Exp, that of V3.1-Terminus: messages to pieces of a prompt. Knows nothing of HTTP or ids.

Sources: the chat template of the model's repository, and for the tools, which that template leaves out, V3.1's model card.
No reasoning of earlier turns is kept. After a tool's results the model goes on without a new turn, and without thinking.
"""

from collections.abc import Sequence

from cluster.chat_encoding import (
    ASSISTANT,
    BOS,
    CALL_BEGIN,
    CALL_END,
    CALL_SEPARATOR,
    CALLS_BEGIN,
    CALLS_END,
    EOS,
    OUTPUT_BEGIN,
    OUTPUT_END,
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
from cluster.tools import ResponseFormat, Tool

_TOOLS = f"""\
IMPORTANT: ALWAYS adhere to this exact format for tool use:
{CALLS_BEGIN}{CALL_BEGIN}tool_call_name{CALL_SEPARATOR}tool_call_arguments{CALL_END}{{additional_tool_calls}}{CALLS_END}

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces"""

_Pieces = list[Piece]


def render(
    messages: Sequence[Message],
    *,
    thinking: bool,
    tools: Sequence[Tool] = (),
    response_format: ResponseFormat | None = None,
) -> _Pieces:
    """The prompt after which the model writes the next assistant message. There is at least one message.

    System messages are gathered at the beginning, wherever they stand. The format has no words for the reply's schema.

    Raises InvalidRequest naming messages[i] where the order cannot be written in this format.
    """
    _check_roles(messages, thinking)
    messages = in_order(messages, system_anywhere=True)
    system = "\n\n".join(message.text for message in messages if message.role == "system")
    pieces = [Piece(BOS, True), plain(system), *_tools(tools)]
    before = "system"
    for message in messages:
        if message.role == "system":
            continue
        if message.role == "user":
            pieces += [Piece(USER, True), plain(message.text)]
        elif message.role == "tool":
            pieces += [Piece(OUTPUT_BEGIN, True), plain(message.text), Piece(OUTPUT_END, True)]
        else:
            if before == "user":
                pieces += [Piece(ASSISTANT, True), Piece(THINK_END, True)]
            pieces += _assistant(message, after_result=before == "tool")
        before = message.role
    if before == "user":
        pieces += [Piece(ASSISTANT, True), Piece(THINK if thinking else THINK_END, True)]
    return [piece for piece in pieces if piece.text]


def _check_roles(messages: Sequence[Message], thinking: bool) -> None:
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role == "developer":
            raise misplaced(f"{where}.role", "this model knows no developer; use system")
        if message.prefix and thinking:
            raise misplaced(f"{where}.prefix", "is not supported by this model where it thinks")


def _tools(tools: Sequence[Tool]) -> _Pieces:
    if not tools:
        return []
    text = "\n\n## Tools\nYou have access to the following tools:\n\n"
    for number, tool in enumerate(tools):
        description = tool.function.get("description") or ""
        parameters = to_json(tool.parameters, f"tools[{number}].function.parameters")
        text += f"### {tool.name}\nDescription: {description}\n\nParameters: {parameters}\n\n"
    return [plain(text), *template(_TOOLS)]


def _assistant(message: Message, *, after_result: bool) -> _Pieces:
    text = message.text
    if not message.tool_calls and not after_result and THINK_END in text:
        text = text.split(THINK_END, 1)[1]  # a client that keeps the reasoning within the content
    pieces = [plain(text)]
    if message.tool_calls:
        pieces.append(Piece(CALLS_BEGIN, True))
        for call in message.tool_calls:
            pieces += [Piece(CALL_BEGIN, True), plain(call.function.name), Piece(CALL_SEPARATOR, True)]
            pieces += [plain(call.function.arguments), Piece(CALL_END, True)]
        pieces.append(Piece(CALLS_END, True))
    return pieces if message.prefix else [*pieces, Piece(EOS, True)]
