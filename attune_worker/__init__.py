"""attune-worker: a fleet of Celery workers for LLM jobs.

Public names are loaded when they are first used, so that a web backend which only submits jobs loads
neither an HTTP client nor any provider.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attune_worker.client import AsyncClient, AsyncJobHandle, Client, JobHandle, result
    from attune_worker.errors import (
        AttuneError,
        ConfigurationError,
        InvalidJobError,
        JobNotFoundError,
        ResultTimeoutError,
        ServiceUnavailableError,
    )
    from attune_worker.jobs import Attempt, Job, JobResult, JobStatus, Message, ModelTier, Usage
    from attune_worker.models.executor import EmpathyLLMExecutor, ExecutionContext, LLMResponse
    from attune_worker.models.pricing import get_pricing_for_model
    from attune_worker.models.registry import ModelInfo, get_all_models, get_model
    from attune_worker.models.task_types import TaskType, get_tier_for_task, is_known_task
    from attune_worker.settings import Settings, get_settings

_HOME = {
    "client": ("AsyncClient", "AsyncJobHandle", "Client", "JobHandle", "result"),
    "errors": (
        "AttuneError",
        "ConfigurationError",
        "InvalidJobError",
        "JobNotFoundError",
        "ResultTimeoutError",
        "ServiceUnavailableError",
    ),
    "jobs": ("Attempt", "Job", "JobResult", "JobStatus", "Message", "ModelTier", "Usage"),
    "models.executor": ("EmpathyLLMExecutor", "ExecutionContext", "LLMResponse"),
    "models.pricing": ("get_pricing_for_model",),
    "models.registry": ("ModelInfo", "get_all_models", "get_model"),
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
