"""The lines of the output: OpenAI's batch results, with cachepipe's own facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from cachepipe import jsontext
from cachepipe.batch.draws import LineDraw
from cachepipe.batch.files import RESULT
from cachepipe.providers.info import per_sample
from cachepipe.typedefs import Response

_FLAGS: Final = ("cached", "duplicated", "indices")
_OWN: Final = frozenset({"id", "custom_id", "response", "error", "cachepipe"})


def answer_line(draw: LineDraw, content: bytes, responses: Sequence[Response]) -> bytes:
    """Return the result line of an answer.

    Args:
        draw: the draw.
        content: the body of the answer.
        responses: the samples of each question.
    """
    body = jsontext.read(content)
    identity = body.get("id") if isinstance(body, dict) else None
    response = {
        "status_code": 200,
        "request_id": identity if isinstance(identity, str) else "",
        "body": jsontext.shown(body),
    }
    return result_line(draw, [str(each.key) for each in responses], response, None, per_sample(responses))


def kept_line(draw: LineDraw, earlier: Mapping[str, Any]) -> bytes:
    """Return the result line of an earlier output for this line."""
    ours = earlier["cachepipe"]
    return result_line(draw, ours.get("keys") or [ours.get("key")], earlier["response"], None, ours)


def result_line(
    draw: LineDraw,
    keys: Sequence[str],
    response: Any,
    error: Mapping[str, str] | None,
    flags: Mapping[str, Any],
) -> bytes:
    """Return a result line.

    Args:
        draw: the draw.
        keys: the keys of its questions.
        response: the response, or None.
        error: the error, or None.
        flags: the flags and indices of the samples.
    """
    line = draw.line
    ours: dict[str, Any] = {name: flags.get(name, []) for name in _FLAGS}
    ours["replicate"] = draw.claimant.replicate
    ours["key"] = keys[0] if len(keys) == 1 else None
    if len(keys) > 1:
        ours["keys"] = list(keys)
    carried = line.carried
    if not jsontext.is_strict(carried):
        carried = {name: jsontext.valid(value) for name, value in carried.items()}
    if hidden := {name: carried[name] for name in filter(_OWN.__contains__, carried)}:
        ours["carried"] = hidden
    head = jsontext.dumps(
        {
            "custom_id": line.custom_id,
            "response": response,
            "error": error,
            "cachepipe": ours,
            **{name: value for name, value in carried.items() if name not in _OWN},
        }
    )
    return b'%b%b",%b\n' % (RESULT, draw.id.encode(), head[1:])
