"""Renders a stranger's chat template; :mod:`tango_runtime.util.limited` runs it.

A template is a program. Jinja's sandbox keeps it from files and from Python's internals, but not from a loop without
end or a text of terabytes; the kernel's limits on its process do.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

#: Maximum number of characters of a rendered chat; those of the hub's templates have hundreds.
_LONGEST = 1 << 20


def reply(request: dict[str, Any]) -> list[dict[str, str]]:
    """``{"template": "…", "chats": [[message, …], …]}`` → a reply for each chat.

    A reply is ``{"text": "…"}`` or ``{"error": "…"}``. Where the template itself has an error, that is the only reply.
    """
    try:
        template = _environment().from_string(request["template"])
    except Exception as error:  # of the template, of memory or of recursion
        return [{"error": f"has an error: {_reason(error)}"}]
    return [_rendered(template, chat) for chat in request["chats"]]


def _rendered(template: Any, messages: list[dict[str, Any]]) -> dict[str, str]:
    try:
        text = template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it may divide by zero
        return {"error": f"cannot be rendered: {_reason(error)}"}
    return {"text": text} if len(text) <= _LONGEST else {"error": f"renders a text of {len(text)} characters"}


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it takes more memory than it may"
    return (str(error) or type(error).__name__)[:300]


def _environment() -> Any:
    """What chat templates of the hub are written for: transformers' settings, filters and functions."""
    from jinja2 import TemplateError, ext, nodes, parser, sandbox  # found on the request's path

    class Generation(ext.Extension):
        """``{% generation %}`` marks the assistant's words for training; its body is rendered and the tag dropped."""

        tags = {"generation"}  # noqa: RUF012 the base class declares it so

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)  # names set inside stay inside, as in transformers

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
