"""attune-worker: a fleet of Celery workers for LLM jobs.

Public names are loaded when they are first used, so that a web backend which only submits jobs loads
neither an HTTP client nor any provider.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attune_worker.async_client import AsyncClient as AsyncClient
    from attune_worker.async_client import AsyncJobHandle as AsyncJobHandle
    from attune_worker.cli.auth import cmd_auth_recommend as cmd_auth_recommend
    from attune_worker.cli.auth import cmd_auth_reset as cmd_auth_reset
    from attune_worker.cli.auth import cmd_auth_setup as cmd_auth_setup
    from attune_worker.cli.auth import cmd_auth_status as cmd_auth_status
    from attune_worker.client import Client as Client
    from attune_worker.client import JobHandle as JobHandle
    from attune_worker.client import result as result
    from attune_worker.errors import AttuneError as AttuneError
    from attune_worker.errors import ConfigurationError as ConfigurationError
    from attune_worker.errors import InvalidJobError as InvalidJobError
    from attune_worker.errors import JobNotFoundError as JobNotFoundError
    from attune_worker.errors import ResultTimeoutError as ResultTimeoutError
    from attune_worker.errors import ServiceUnavailableError as ServiceUnavailableError
    from attune_worker.jobs import Attempt as Attempt
    from attune_worker.jobs import AuthMode as AuthMode
    from attune_worker.jobs import Job as Job
    from attune_worker.jobs import JobResult as JobResult
    from attune_worker.jobs import JobStatus as JobStatus
    from attune_worker.jobs import Message as Message
    from attune_worker.jobs import ModelTier as ModelTier
    from attune_worker.jobs import Usage as Usage
    from attune_worker.models.adaptive import AdaptiveModelRouter as AdaptiveModelRouter
    from attune_worker.models.auth import AuthStrategy as AuthStrategy
    from attune_worker.models.auth import SubscriptionTier as SubscriptionTier
    from attune_worker.models.auth_current import get_auth_strategy as get_auth_strategy
    from attune_worker.models.breaker import CircuitBreaker as CircuitBreaker
    from attune_worker.models.estimation import Estimate as Estimate
    from attune_worker.models.executor import EmpathyLLMExecutor as EmpathyLLMExecutor
    from attune_worker.models.executor import ExecutionContext as ExecutionContext
    from attune_worker.models.executor import LLMResponse as LLMResponse
    from attune_worker.models.pricing import get_pricing_for_model as get_pricing_for_model
    from attune_worker.models.registry import ModelInfo as ModelInfo
    from attune_worker.models.registry import get_all_models as get_all_models
    from attune_worker.models.registry import get_model as get_model
    from attune_worker.models.source_lines import SourceFileError as SourceFileError
    from attune_worker.models.source_lines import count_lines_of_code as count_lines_of_code
    from attune_worker.models.task_types import TaskType as TaskType
    from attune_worker.models.task_types import get_tier_for_task as get_tier_for_task
    from attune_worker.models.task_types import is_known_task as is_known_task
    from attune_worker.settings import Settings as Settings
    from attune_worker.settings import get_settings as get_settings

_HOME = {
    "async_client": ("AsyncClient", "AsyncJobHandle"),
    "cli.auth": ("cmd_auth_recommend", "cmd_auth_reset", "cmd_auth_setup", "cmd_auth_status"),
    "client": ("Client", "JobHandle", "result"),
    "errors": (
        "AttuneError",
        "ConfigurationError",
        "InvalidJobError",
        "JobNotFoundError",
        "ResultTimeoutError",
        "ServiceUnavailableError",
    ),
    "jobs": ("Attempt", "AuthMode", "Job", "JobResult", "JobStatus", "Message", "ModelTier", "Usage"),
    "models.adaptive": ("AdaptiveModelRouter",),
    "models.auth": ("AuthStrategy", "SubscriptionTier"),
    "models.auth_current": ("get_auth_strategy",),
    "models.breaker": ("CircuitBreaker",),
    "models.estimation": ("Estimate",),
    "models.executor": ("EmpathyLLMExecutor", "ExecutionContext", "LLMResponse"),
    "models.pricing": ("get_pricing_for_model",),
    "models.registry": ("ModelInfo", "get_all_models", "get_model"),
    "models.source_lines": ("SourceFileError", "count_lines_of_code"),
    "models.task_types": ("TaskType", "get_tier_for_task", "is_known_task"),
    "settings": ("Settings", "get_settings"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
