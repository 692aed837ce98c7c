"""Which models are there, what can each of them do, and which comes first?

The catalog beside this file, with the user's ``[[models]]`` over it. Neither is changed after loading.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from attune_worker.errors import ConfigurationError
from attune_worker.jobs import ModelTier
from attune_worker.sections import ModelSettings, ProviderSettings
from attune_worker.settings import Settings, get_settings

_CATALOG = Path(__file__).with_name("catalog.toml")

_OWN_CAPABILITIES = frozenset({"text", "temperature"})
"""What a model from ``[[models]]`` can do unless it says otherwise: what nearly every server takes."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model as one provider serves it.

    ``context_window`` (prompt and answer together) and ``max_output_tokens`` are in tokens, None where
    not known. ``capabilities`` are words such as text, vision, tools, reasoning, temperature. The costs
    are in USD per million tokens and only those that the user set; ``price_list`` and ``base_url`` say
    where ``pricing`` may look for published ones.
    """

    id: str
    provider: str
    tier: ModelTier
    context_window: int | None = None
    max_output_tokens: int | None = None
    capabilities: frozenset[str] = _OWN_CAPABILITIES
    input_cost_per_million: Decimal | None = None
    output_cost_per_million: Decimal | None = None
    cache_read_cost_per_million: Decimal | None = None
    cache_write_cost_per_million: Decimal | None = None
    price_list: str | None = None
    base_url: str | None = None

    def __hash__(self) -> int:
        """Hash the key alone: a model is a cache key on the path of every call, and ten fields cost microseconds."""
        return hash((self.provider, self.id))

    @property
    def ref(self) -> str:
        """The name that means this model and no other: ``provider/id``."""
        return f"{self.provider}/{self.id}"


class Registry:
    """All models that are configured, in order of preference. Immutable.

    The order is: ``provider_order`` first, then the other providers by name; within a provider and tier
    the user's own models first, then the catalog's, each in the order of their file.
    """

    __slots__ = ("_by_ref", "_by_tier", "_models", "_providers")

    def __init__(self, models: Iterable[ModelInfo], providers: Iterable[str] = ()) -> None:
        """Keep ``models`` in the order given; ``providers`` names those that may have no model at all."""
        self._models = tuple(models)
        self._providers = tuple(sorted({*providers, *(model.provider for model in self._models)}))
        self._by_tier = {tier: tuple(m for m in self._models if m.tier is tier) for tier in ModelTier}
        self._by_ref = _references(self._models)

    @classmethod
    def from_settings(cls, settings: Settings) -> Registry:
        """Lay the user's models over the catalog.

        Raises ``ConfigurationError`` naming the key when a model that is not in the catalog has no tier,
        or one is given twice.
        """
        found = {(model.provider, model.id): model for model in _catalog()}
        own: list[tuple[str, str]] = []
        for index, given in enumerate(settings.models):
            key = (given.provider, given.id)
            if key in own:
                raise ConfigurationError(f"models.{index}.id: {given.id!r} of {given.provider!r} is given twice")
            own.append(key)
            if given.enabled:
                found[key] = _laid_over(found.get(key), given, index)
            else:
                found.pop(key, None)
        models = [_with_price_list(model, settings.providers[model.provider]) for model in found.values()]
        return cls(sorted(models, key=_preference(settings.provider_order, own)), settings.providers)

    @property
    def providers(self) -> tuple[str, ...]:
        """The names of all configured providers, also of those without models, sorted."""
        return self._providers

    def all(self) -> tuple[ModelInfo, ...]:
        """Return every model."""
        return self._models

    def of_tier(self, tier: ModelTier) -> tuple[ModelInfo, ...]:
        """Return the models of one tier."""
        return self._by_tier[tier]

    def find(self, ref: str) -> tuple[ModelInfo, ...]:
        """Return the models that ``ref`` means, none if there is none.

        ``provider/id`` means one model. A bare id, which may itself hold slashes, means that model at
        every provider that serves it; where both readings are possible the first one wins.
        """
        return self._by_ref.get(ref, ())

    def get(self, provider: str, tier: ModelTier | str) -> ModelInfo:
        """Return the preferred model of a provider and tier.

        Raises ``ConfigurationError``, with the names that are known, for an unknown provider or tier and
        where the provider has no model of that tier.
        """
        if provider not in self._providers:
            raise ConfigurationError(_unknown("provider", provider, self._providers))
        if tier not in self._by_tier:
            raise ConfigurationError(_unknown("tier", tier, list(ModelTier)))
        served = [model for model in self._models if model.provider == provider]
        for model in served:
            if model.tier == tier:
                return model
        tiers = ", ".join(known for known in ModelTier if any(model.tier is known for model in served)) or "none"
        raise ConfigurationError(f"provider {provider!r} has no model of tier {str(tier)!r}; it has: {tiers}")


@cache
def get_registry() -> Registry:
    """Return the registry of this process's settings, built once."""
    return Registry.from_settings(get_settings())


def get_model(provider: str, tier: ModelTier | str) -> ModelInfo:
    """Return the preferred model of a provider and tier; raises as ``Registry.get`` does."""
    return get_registry().get(provider, tier)


def get_all_models() -> tuple[ModelInfo, ...]:
    """Return every configured model, in order of preference."""
    return get_registry().all()


@cache
def _catalog() -> tuple[ModelInfo, ...]:
    with _CATALOG.open("rb") as stream:
        rows = tomllib.load(stream)["models"]
    return tuple(_from_row(row) for row in rows)


def _from_row(row: Mapping[str, Any]) -> ModelInfo:
    return ModelInfo(
        id=row["id"],
        provider=row["provider"],
        tier=ModelTier(row["tier"]),
        context_window=row["context_window"],
        max_output_tokens=row["max_output_tokens"],
        capabilities=frozenset(row["capabilities"]),
    )


def _laid_over(below: ModelInfo | None, given: ModelSettings, index: int) -> ModelInfo:
    if below is None:
        if given.tier is None:
            tiers = ", ".join(ModelTier)
            raise ConfigurationError(
                f"models.{index}.tier: is required, as {given.id!r} is not in the catalog; allowed: {tiers}"
            )
        below = ModelInfo(id=given.id, provider=given.provider, tier=given.tier)
    fields = {name: value for name, value in given if name != "enabled" and value is not None}
    return replace(below, **fields)


def _with_price_list(model: ModelInfo, provider: ProviderSettings) -> ModelInfo:
    return replace(model, price_list=provider.price_list, base_url=provider.base_url)


def _preference(
    provider_order: tuple[str, ...], own: list[tuple[str, str]]
) -> Callable[[ModelInfo], tuple[int, str, int]]:
    """Return a sort key; sorting is stable, so what it holds equal keeps the catalog's order."""
    rank = {name: place for place, name in enumerate(provider_order)}
    place = {key: index for index, key in enumerate(own)}

    def key(model: ModelInfo) -> tuple[int, str, int]:
        return rank.get(model.provider, len(rank)), model.provider, place.get((model.provider, model.id), len(place))

    return key


def _references(models: Iterable[ModelInfo]) -> dict[str, tuple[ModelInfo, ...]]:
    models = tuple(models)
    exact = {model.ref: (model,) for model in models}
    by_id: dict[str, tuple[ModelInfo, ...]] = {}
    for model in models:
        by_id[model.id] = (*by_id.get(model.id, ()), model)
    return by_id | exact


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    hint = f"did you mean {str(close[0])!r}? " if close else ""
    return f"unknown {what} {str(name)!r}; {hint}known: {', '.join(names)}"
