"""Compiles a stranger's JSON schema, as a program of its own: ``check_schema.py SECONDS BYTES < request > reply``.

llguidance limits its own work, but not all of it: patterns of which a string must match several, or a large multipleOf,
keep it busy for minutes. The kernel's limits on this process end that. Nothing of tango-edge is imported: it starts
fast. The tokenizer is one of single bytes: how long compiling takes depends little on it.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any


def main() -> None:
    """Reads ``{"path": [folder, …], "schema": "…", "options": {…}, "limits": {…}}``; writes ``{"error": "…"}``.

    The error is empty for a schema that can be followed.
    """
    seconds, size = map(int, sys.argv[1:])
    for kind, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, size), (resource.RLIMIT_CORE, 0)):
        allowed = resource.getrlimit(kind)[1]
        most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
        resource.setrlimit(kind, (most, most))
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    json.dump({"error": _error(request["schema"], request["options"], request["limits"])}, sys.stdout)


def _error(schema: str, options: dict[str, Any], limits: dict[str, Any]) -> str:
    import llguidance  # found on the request's path

    try:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)
    except ValueError as error:
        return str(error)
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**limits))
    if not matcher.is_error():
        matcher.compute_bitmask()  # a schema that nothing fits shows here
    return str(matcher.get_error())


class _Bytes:
    """A tokenizer of single bytes, as llguidance asks for one."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


if __name__ == "__main__":
    main()
