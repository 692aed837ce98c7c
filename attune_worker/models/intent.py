"""What is written down before a call, so that any process can settle it: whose is it, and what does it call?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from attune_worker.budget import BudgetKey
from attune_worker.jobs import AuthMode, Job
from attune_worker.models.adaptive import place_of
from attune_worker.models.calls import Quote
from attune_worker.sections import DEFAULT_CREDENTIAL
from attune_worker.store.keys import part

Fields = Mapping[bytes, bytes]
"""What Redis knows of one call."""

_WINDOWS: dict[str, Literal["day", "month"]] = {"d": "day", "m": "month"}


@dataclass(frozen=True, slots=True)
class Intent:
    """One call, in the words of the ledger. ``lease`` is that of the worker that makes it, empty for other programs.

    ``budgets`` are those that it counts against, whatever the settings of the process that settles it.
    """

    job_id: str
    lease: str
    tenant: str | None
    workflow: str
    stage: str
    provider: str
    model_id: str
    tier: str
    budgets: tuple[BudgetKey, ...]
    mode: str = AuthMode.API.value
    credential: str = DEFAULT_CREDENTIAL

    @property
    def group(self) -> str:
        """The place of the call in the sums of its day: see ``ledger.DIMENSIONS``."""
        names = (self.tenant, self.workflow, self.provider, self.model_id, self.tier, self.mode)
        return ":".join(map(part, names))

    def names(self) -> dict[str, Any]:
        """Return what the call's record begins with; a call without a tenant has none there either."""
        return {
            "job": self.job_id,
            **({} if self.tenant is None else {"tenant": self.tenant}),
            "workflow": self.workflow,
            "stage": self.stage,
            "provider": self.provider,
            "model": self.model_id,
            "tier": self.tier,
            "mode": self.mode,
            **({} if self.credential == DEFAULT_CREDENTIAL else {"credential": self.credential}),
        }

    def kept(self) -> list[str]:
        """Return the fields that ADMIT keeps with the call, names and values in turn.

        They are short ones, because Redis takes several times as much for a hash with a long one.
        """
        fields = {**self.names(), "lease": self.lease, "budgets": " ".join(map(_word, self.budgets))}
        if self.mode == AuthMode.API:
            del fields["mode"]
        return [text for field in fields.items() for text in field]

    @classmethod
    def for_call(cls, job_id: str, lease: str, job: Job, quote: Quote, budgets: tuple[BudgetKey, ...]) -> Self:
        """Return what is written down before a call for ``job`` to the model of ``quote``."""
        (workflow, stage), model, credential = place_of(job), quote.model, quote.credential
        return cls(
            job_id=job_id,
            lease=lease,
            tenant=job.tenant,
            workflow=workflow,
            stage=stage,
            provider=model.provider,
            model_id=model.id,
            tier=model.tier.value,
            budgets=budgets,
            mode=credential.mode.value,
            credential=credential.name,
        )

    @classmethod
    def of(cls, call: Fields) -> Self:
        """Read what ADMIT has kept of a call; raises ``ValueError`` where that is not all there."""
        tenant = _text(call, b"tenant") if b"tenant" in call else None
        workflow, provider = _text(call, b"workflow"), _text(call, b"provider")
        return cls(
            job_id=_text(call, b"job"),
            lease=_text(call, b"lease"),
            tenant=tenant,
            workflow=workflow,
            stage=_text(call, b"stage"),
            provider=provider,
            model_id=_text(call, b"model"),
            tier=_text(call, b"tier"),
            budgets=tuple(_budgets(_text(call, b"budgets").split(), tenant, workflow, provider)),
            mode=_text(call, b"mode") if b"mode" in call else AuthMode.API.value,
            credential=_text(call, b"credential") if b"credential" in call else DEFAULT_CREDENTIAL,
        )


def _text(call: Fields, name: bytes) -> str:
    if name not in call:
        raise ValueError(f"the call has no {name.decode()}")
    return call[name].decode(errors="surrogatepass")


def _word(budget: BudgetKey) -> str:
    """Return a budget's window and which of the call's own names it is about, such as ``d`` or ``mtp``."""
    about = zip("twp", (budget.tenant, budget.workflow, budget.provider), strict=True)
    return budget.per[0] + "".join(letter for letter, name in about if name is not None)


def _budgets(words: Iterable[str], tenant: str | None, workflow: str, provider: str) -> Iterable[BudgetKey]:
    for word in words:
        per, about = _WINDOWS.get(word[0]), set(word[1:])
        if per is None or not about <= set("twp") or ("t" in about and tenant is None):
            raise ValueError(f"{word!r} is no budget of this call")
        yield BudgetKey(
            per,
            tenant if "t" in about else None,
            workflow if "w" in about else None,
            provider if "p" in about else None,
            hard_nano=None,
            soft_nano=None,
        )
