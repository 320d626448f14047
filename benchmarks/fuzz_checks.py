"""Checks of our own for schemathesis, which loads this module through `SCHEMATHESIS_HOOKS`. See `fuzz_http.py`.

A request that satisfies the schema may be refused for reasons that a schema cannot express. `explained_refusal` stands
in for schemathesis' own check of such requests: the reason given has to be true of the request, so a needless refusal
is still found. `explained_server_error` stands in for its check of server errors, which knows no timeouts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

DEPENDS_ON_THE_MODEL = frozenset({"context_length_exceeded", "request_too_large"})
"""Codes of refusals that only the server can judge: whether a request fits the model and its cache."""
SHORT_SECONDS = 5.0
"""Timeouts below this may be too short on a busy machine."""
_DEFAULT_COMPLETION_TOKENS = 16


def refusal_is_explained(body: dict[str, Any], error: dict[str, Any], vocab_size: int) -> bool:
    """Whether `body`, which satisfies the schema, breaks the rule that `error` names.

    Args:
        body: of the request.
        error: the error object of the answer.
        vocab_size: of the served model.
    """
    if error["code"] in DEPENDS_ON_THE_MODEL:
        return True
    if error["code"] != "invalid_parameter":
        return False
    num_answers = body.get("n") or 1
    match (error["param"] or "").partition("[")[0]:
        case "best_of":
            best_of = body.get("best_of")
            return best_of is not None and (
                best_of < num_answers or (bool(body.get("stream")) and best_of > num_answers)
            )
        case "min_tokens":
            return (body.get("min_tokens") or 0) > min(_limits(body), default=_DEFAULT_COMPLETION_TOKENS)
        case "prompt":
            return _is_empty_prompt(body.get("prompt")) or any(token_id >= vocab_size for token_id in _ids(body))
        case "stop_token_ids":
            return any(token_id >= vocab_size for token_id in body.get("stop_token_ids") or ())
        case "logit_bias":
            return any(int(token_id) >= vocab_size for token_id in body.get("logit_bias") or ())
    return False


def server_error_is_explained(status: int, code: str | None, timeout: float | None) -> bool:
    """Whether a server error is what the client asked for: a time so short that nothing can be done in it.

    Args:
        status: of the answer.
        code: of its error.
        timeout: that the request gave, in its body or its query.
    """
    is_timeout = (status, code) in ((504, "request_timeout"), (503, "engine_stalled"))
    return is_timeout and timeout is not None and timeout < SHORT_SECONDS


def _limits(body: dict[str, Any]) -> Iterator[int]:
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) is not None:
            yield max(1, body[name])


def _is_empty_prompt(prompt: Any) -> bool:
    return prompt == "" or (isinstance(prompt, list) and "" in prompt)


def _ids(body: dict[str, Any]) -> Iterator[int]:
    prompt = body.get("prompt")
    for item in prompt if isinstance(prompt, list) else ():
        if isinstance(item, list):
            yield from item
        elif not isinstance(item, str):
            yield item


def register() -> None:
    """Tell schemathesis of the check."""
    import schemathesis

    vocab_size = int(os.environ["FUZZ_VOCAB_SIZE"])

    @schemathesis.check
    def explained_refusal(context: Any, response: Any, case: Any) -> None:
        """A request that satisfies the schema is refused for a true reason only."""
        if response.status_code != 400 or case.meta is None or not case.meta.generation.mode.is_positive:
            return
        error = response.json()["error"]
        if not isinstance(case.body, dict) or not refusal_is_explained(case.body, error, vocab_size):
            raise AssertionError(f"A valid request was refused: {error}")

    @schemathesis.check
    def explained_server_error(context: Any, response: Any, case: Any) -> None:
        """There is no server error but those that a client asks for."""
        if response.status_code < 500:
            return
        given = case.body.get("timeout") if isinstance(case.body, dict) else case.query.get("timeout")
        if isinstance(given, list):  # given several times in the query, of which the last counts
            given = given[-1]
        timeout = None if given is None else float(given)
        if not server_error_is_explained(response.status_code, response.json()["error"]["code"], timeout):
            raise AssertionError(f"Server error {response.status_code}: {response.text[:500]}")


if "FUZZ_VOCAB_SIZE" in os.environ:
    register()
