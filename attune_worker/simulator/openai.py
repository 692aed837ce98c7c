"""How does OpenAI's Chat Completions API look from the inside?

Shapes: platform.openai.com/docs/api-reference/chat, /docs/guides/error-codes and /docs/guides/rate-limits.
What OpenAI refuses for single models (``max_tokens`` for reasoning models, say) is accepted, because most
servers and gateways that speak this format accept it.
"""

from __future__ import annotations

from typing import Any

from attune_worker.simulator.answers import ModelAnswer, Turn
from attune_worker.simulator.profile import Fault
from attune_worker.simulator.rate import Allowance
from attune_worker.simulator.wire import Call, Headers, Refusal, Tokens, bearer_token, is_integer, is_number, text_of

_DOCUMENTED_FIELDS = """
model messages audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens
metadata modalities n parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_retention
reasoning_effort response_format safety_identifier seed service_tier stop store stream stream_options temperature
tool_choice tools top_logprobs top_p user verbosity web_search_options
"""
_FIELDS = frozenset(_DOCUMENTED_FIELDS.split())
_ROLES = ("system", "assistant", "user", "function", "tool", "developer")
_SYSTEM_ROLES = ("system", "developer")
_FINISH_REASONS = {"stop": "stop", "length": "length", "stop_sequence": "stop"}
_MAX_STOP_SEQUENCES = 4


class OpenAIWire:
    """``POST /v1/chat/completions``."""

    name = "openai"
    request_id_header = "x-request-id"
    writes_are_billed = False

    def key(self, headers: Headers) -> str | None:
        """Return the bearer token."""
        return bearer_token(headers)

    def subscription(self, headers: Headers) -> str | None:
        """Return None: no subscription is accepted here."""
        return None

    def wrong_key(self, key: str | None) -> Refusal:
        """Refuse a missing key (None) or a wrong one, without repeating it."""
        if key is None:
            return self.invalid("You didn't provide an API key.", status=401)
        return self.invalid("Incorrect API key provided.", status=401, code="invalid_api_key")

    def unpaid(self) -> Refusal:
        """Refuse a key that is right but not paid for; OpenAI has no 402, and this is how DeepSeek says it."""
        return Refusal(402, "unknown_error", "Insufficient Balance", code="invalid_request_error")

    def invalid(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> Refusal:
        """Refuse a request that is wrong in itself."""
        return Refusal(status, "invalid_request_error", message, param=param, code=code)

    def too_large(self) -> Refusal:
        """Refuse a body that is too large."""
        return self.invalid("Request body is too large.", status=413)

    def unknown_model(self, model: str) -> Refusal:
        """Refuse a model that the provider does not offer."""
        message = f"The model `{model}` does not exist or you do not have access to it."
        return self.invalid(message, code="model_not_found", status=404)

    def too_long(self, prompt_tokens: int, window: int) -> Refusal:
        """Refuse a prompt that does not fit the window."""
        message = (
            f"This model's maximum context length is {window} tokens. However, your messages resulted in "
            f"{prompt_tokens} tokens. Please reduce the length of the messages."
        )
        return self.invalid(message, param="messages", code="context_length_exceeded")

    def failure(self, fault: Fault, model: str, wait_seconds: float) -> Refusal:
        """Return what the provider answers to a call that a fault hits before the model runs."""
        match fault:
            case Fault.RATE_LIMITED:
                message = f"Rate limit reached for {model} on requests per min (RPM). Please try again later."
                return Refusal(429, "requests", message, code="rate_limit_exceeded", wait_seconds=wait_seconds)
            case Fault.SPEND_LIMIT:
                message = "You exceeded your current quota, please check your plan and billing details."
                return Refusal(429, "insufficient_quota", message, code="insufficient_quota")
            case Fault.CREDENTIAL:
                return self.wrong_key("revoked")
            case Fault.OVERLOADED:
                return Refusal(503, "server_error", "The engine is currently overloaded, please try again later")
            case Fault.SERVER_ERROR:
                return Refusal(500, "server_error", "The server had an error while processing your request.")
            case _:
                return self.invalid("The simulated provider does not like this request.", param="messages")

    def request_id(self, serial: str) -> str:
        """Return the id of a request."""
        return f"req_{serial}"

    def answer_id(self, serial: str) -> str:
        """Return the id of an answer."""
        return f"chatcmpl-{serial}"

    def success(self, answer_id: str, model: str, answer: ModelAnswer, tokens: Tokens, now: float) -> dict[str, Any]:
        """Return the body of a 200; here ``prompt_tokens`` includes what was read from the cache."""
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None, "annotations": []}
        finish_reason = _FINISH_REASONS[answer.finish_reason]
        return {
            "id": answer_id,
            "object": "chat.completion",
            "created": int(now),
            "model": model,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}],
            "usage": {
                "prompt_tokens": tokens.input,
                "completion_tokens": tokens.output,
                "total_tokens": tokens.input + tokens.output,
                "prompt_tokens_details": {"cached_tokens": tokens.cache_read, "audio_tokens": 0},
                "completion_tokens_details": {
                    "reasoning_tokens": 0,
                    "audio_tokens": 0,
                    "accepted_prediction_tokens": 0,
                    "rejected_prediction_tokens": 0,
                },
            },
            "service_tier": "default",
            "system_fingerprint": "fp_simulator",
        }

    def error(self, refusal: Refusal, request_id: str) -> dict[str, Any]:
        """Return the body of a refusal."""
        fields = {"message": refusal.message, "type": refusal.kind, "param": refusal.param, "code": refusal.code}
        return {"error": fields}

    def limit_headers(self, allowance: Allowance, now: float) -> dict[str, str]:
        """Tell a caller how much of its limit is left, with the reset as a Go duration."""
        return {
            "x-ratelimit-limit-requests": str(allowance.limit),
            "x-ratelimit-remaining-requests": str(allowance.remaining),
            "x-ratelimit-reset-requests": go_duration(allowance.reset_seconds),
        }

    def models(self, ids: list[str]) -> dict[str, Any]:
        """Return the body that lists what the provider offers."""
        models = [{"id": model, "object": "model", "created": 1735689600, "owned_by": "simulator"} for model in ids]
        return {"object": "list", "data": models}

    def parse(self, body: dict[str, Any], headers: Headers) -> Call:
        """Return the call, or raise the ``Refusal`` that the real API answers such a request with."""
        if unknown := body.keys() - _FIELDS:
            raise self.invalid(f"Unknown parameter: '{min(unknown)}'.", param=min(unknown), code="unknown_parameter")
        if not body.get("model"):
            raise self.invalid("you must provide a model parameter")
        if not isinstance(body["model"], str):
            raise self._wrong_type("model", "a string", body["model"])
        self._check_unsupported(body)
        self._check_temperature(body.get("temperature"))
        turns = self._turns(body)
        said = tuple(turn for turn in turns if turn[0] not in _SYSTEM_ROLES)
        return Call(
            model=body["model"],
            system="\n".join(text for role, text in turns if role in _SYSTEM_ROLES),
            turns=said,
            max_tokens=self._max_tokens(body),
            stop=self._stop(body.get("stop")),
            # caching needs no marker here: a repeated beginning is found by itself
            cacheable_turns=max(len(said) - 1, 0),
        )

    def _check_unsupported(self, body: dict[str, Any]) -> None:
        if body.get("stream"):
            raise self.invalid("This simulator does not stream; leave 'stream' out.", param="stream")
        if body.get("n") not in (None, 1):
            raise self.invalid("This simulator gives one choice; leave 'n' out.", param="n")

    def _check_temperature(self, value: Any) -> None:
        if value is None:
            return
        if not is_number(value):
            raise self._wrong_type("temperature", "a decimal", value)
        if value > 2:
            message = (
                f"Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got {value} instead."
            )
            raise self.invalid(message, param="temperature", code="decimal_above_max_value")
        if value < 0:
            message = (
                f"Invalid 'temperature': decimal below minimum value. Expected a value >= 0, but got {value} instead."
            )
            raise self.invalid(message, param="temperature", code="decimal_below_min_value")

    def _max_tokens(self, body: dict[str, Any]) -> int | None:
        given = [name for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
        if len(given) == 2:
            message = "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported."
            raise self.invalid(message, code="invalid_parameter_combination")
        return self._positive(given[0], body[given[0]]) if given else None

    def _positive(self, name: str, value: Any) -> int:
        if not is_integer(value):
            raise self._wrong_type(name, "an integer", value)
        if value < 1:
            message = f"Invalid '{name}': integer below minimum value. Expected a value >= 1, but got {value} instead."
            raise self.invalid(message, param=name, code="integer_below_min_value")
        return int(value)

    def _stop(self, value: Any) -> tuple[str, ...]:
        stop = [value] if isinstance(value, str) else value or []
        if not isinstance(stop, list) or not all(isinstance(sequence, str) for sequence in stop):
            raise self._wrong_type("stop", "a string or an array of strings", value)
        if len(stop) > _MAX_STOP_SEQUENCES:
            message = f"Invalid 'stop': array too long. Expected at most {_MAX_STOP_SEQUENCES} items, got {len(stop)}."
            raise self.invalid(message, param="stop", code="array_above_max_length")
        return tuple(sequence for sequence in stop if sequence)

    def _turns(self, body: dict[str, Any]) -> list[Turn]:
        messages = body.get("messages")
        if messages is None:
            message = "Missing required parameter: 'messages'."
            raise self.invalid(message, param="messages", code="missing_required_parameter")
        if not isinstance(messages, list):
            raise self._wrong_type("messages", "an array of objects", messages)
        if not messages:
            message = "Invalid 'messages': empty array. Expected an array with minimum length 1."
            raise self.invalid(message, param="messages", code="empty_array")
        return [self._turn(f"messages[{place}]", message) for place, message in enumerate(messages)]

    def _turn(self, param: str, message: Any) -> Turn:
        if not isinstance(message, dict):
            raise self._wrong_type(param, "an object", message)
        role, content = message.get("role"), message.get("content")
        if role is None:
            text = f"Missing required parameter: '{param}.role'."
            raise self.invalid(text, param=f"{param}.role", code="missing_required_parameter")
        if role not in _ROLES:
            text = f"Invalid value: '{role}'. Supported values are: {', '.join(map(repr, _ROLES))}."
            raise self.invalid(text, param=f"{param}.role", code="invalid_value")
        # an assistant that only called tools said nothing
        if not isinstance(content, str) and not _is_parts(content) and not (content is None and role == "assistant"):
            raise self._wrong_type(f"{param}.content", "a string or an array of objects", content)
        return role, text_of(content)

    def _wrong_type(self, param: str, expected: str, value: Any) -> Refusal:
        message = f"Invalid type for '{param}': expected {expected}, but got {_json_type(value)} instead."
        return self.invalid(message, param=param, code="invalid_type")


def go_duration(seconds: float) -> str:
    """Return ``seconds`` the way Go prints a duration, and OpenAI a reset: ``12ms``, ``1.5s``, ``6m0s``."""
    milliseconds = round(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


def _is_parts(content: Any) -> bool:
    """Whether ``content`` is a list of content parts; parts other than text are accepted and not read."""
    return isinstance(content, list) and all(
        isinstance(part, dict) and (part.get("type") != "text" or isinstance(part.get("text"), str)) for part in content
    )


def _json_type(value: Any) -> str:
    if is_integer(value):
        return "an integer"
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", float: "a decimal"}
    return names.get(type(value), "null")
