"""Which keys are there in Redis, of what type, in which slot, and for how long?

===========  ======  =================================  ==============================================
key          type    name                               lifetime
===========  ======  =================================  ==============================================
record       hash    ``{ns:07}:job:<id>``               none until the job ends (an accepted job must
                                                        not vanish), then ``retention_seconds``
queued       zset    ``{ns:07}:queued``                 none; an entry leaves when its job is claimed
                                                        or ends. Score: when its last wake-up was sent, ms
running      hash    ``{ns:07}:running``                none; a field leaves when its job ends or waits.
                                                        Job id -> lease of the worker that runs it
waiters      set     ``{ns:07}:waiters:<id>``           an hour after the last client began to wait;
                                                        gone when the job ends
due          zset    ``{ns:07}:due``                    none; an entry leaves when its job is claimed or
                                                        ends. Score, ms: when to wake a job that waits
                                                        next; below zero, the deadline of one that is
                                                        queued
dead         zset    ``{ns:07}:dead``                   none; an entry leaves when its job is retried, or
                                                        after its record. Score: time of the end, ms
ended        zset    ``{ns:07}:ended``                  none; the latest 1,000 that ended in this shard.
                                                        Score: time of the end, ms
inbox        channel ``{ns}:inbox:<client>``            pub/sub, kept nowhere
circuit      hash    ``{ns}:breaker:<provider>:<tier>`` a day longer than it is open or forced, 366 days where
                                                        it is forced without end; gone means closed
circuits     set     ``{ns}:breakers``                  366 days after the last write
limits       hash    ``{ns}:limits:<provider>``         an hour after the last write: by then all of a
                                                        minute's allowance is back
limits       hash    ``{ns}:limits:<provider>:<model>``, ``{ns}:limits:<provider>:<model>:<credential>``
                                                        as above, and longer than its cooldown
credential   hash    ``{ns}:credential:<provider>:<name>``  8 days after the last write: a day longer than the
                                                        longest quota window, so that nothing that still
                                                        counts is forgotten. Missing means accepted
slots        zset    ``{ns}:slots:<provider>``          a day after the last write; an entry counts until
                                                        the end of its call's lease, its score (ms)
budget       hash    ``{ns}:budget:<tenant>:<workflow>:<provider>:<per>``  63 days after the last write, or a
                                                        day longer than a limit that was set; none while
                                                        one is set for good, which must not lapse
call         hash    ``{ns}:call:<id>``                 none while it is under way; then ``retention_seconds``,
                                                        at least ten minutes: until then a second one is
                                                        known for one
calls        zset    ``{ns}:calls``                     none: it shows calls whose worker died, and they
                                                        must not vanish; an entry leaves when its call
                                                        is settled. Score: end of the call's lease, ms
jobcalls     list    ``{ns}:jobcalls:<job id>``         63 days from the latest ADMIT; when that call has been
                                                        settled, as long as it. Ids of the job's calls, in order
workers      zset    ``{ns}:workers``                   none; an entry leaves when its worker ends, or is
                                                        found dead. Lease -> its end, ms
sweep        hash    ``{ns}:sweep``                     a day: since when leases are watched without a gap
ledger       stream  ``{ns}:ledger``                    one entry a call; ``ledger.retention_days``, and no
                                                        more than about ``ledger.max_records``
costs        hash    ``{ns}:costs:<day>``               ``ledger.sums_retention_days``
stats        hash    ``{ns}:stats:<workflow>:<stage>:<day>``  35 days after the last write
evidence     hash    ``{ns}:evidence:<workflow>:<stage>``, ``{ns}:evidence:<workflow>``, ``{ns}:evidence``
                                                        35 days after the last write
stages       zset    ``{ns}:stages``                    35 days; score: last call, ms
sweeper      string  ``{ns}:sweeper``                   a few seconds: which worker sends what is due
auth         string  ``{ns}:auth``                      none: an operator decided it, and it must not lapse.
                                                        The auth strategy, where the fleet shares it
authlines    hash    ``{ns}:auth:lines``                35 days after the last write
===========  ======  =================================  ==============================================

Jobs are spread over ``SHARDS`` shards by a checksum of their id; all of a job's keys share the tag of
its shard, and so one slot of a Redis Cluster. What the fleet knows lives under the tag ``{ns}``.
Names that come from outside are percent-encoded in keys, or hashed when they are long, so that no two
names share a key.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote
from uuid import UUID, uuid4
from zlib import crc32

from attune_worker.sections import DEFAULT_CREDENTIAL

MAX_PART = 120
"""Characters of an encoded name that stand in a key; a longer one is hashed."""

SHARDS = 16
"""Fixed: a job's shard follows from its id alone, so changing it would orphan the records there are."""


@dataclass(frozen=True, slots=True)
class ShardKeys:
    """The indexes of one shard's jobs."""

    namespace: str
    shard: int

    @property
    def tag(self) -> str:
        """What all keys of the shard begin with."""
        return f"{{{self.namespace}:{self.shard:02d}}}"

    @property
    def queued(self) -> str:
        """The jobs that wait for their first start."""
        return f"{self.tag}:queued"

    @property
    def running(self) -> str:
        """The jobs that run, with the lease of the worker that runs each."""
        return f"{self.tag}:running"

    @property
    def due(self) -> str:
        """The jobs to look at, by the time when."""
        return f"{self.tag}:due"

    @property
    def dead(self) -> str:
        """The jobs that too many workers died with."""
        return f"{self.tag}:dead"

    @property
    def ended(self) -> str:
        """The jobs that ended last."""
        return f"{self.tag}:ended"


@dataclass(frozen=True, slots=True)
class JobKeys:
    """The keys of one job."""

    record: str
    queued: str
    running: str
    due: str
    dead: str
    ended: str
    waiters: str

    @classmethod
    def of(cls, namespace: str, job_id: str) -> JobKeys:
        """Return the keys of ``job_id``."""
        shard = ShardKeys(namespace, shard_of(job_id))
        tag = shard.tag
        return cls(
            record=f"{tag}:job:{job_id}",
            queued=shard.queued,
            running=shard.running,
            due=shard.due,
            dead=shard.dead,
            ended=shard.ended,
            waiters=f"{tag}:waiters:{job_id}",
        )

    @property
    def all(self) -> tuple[str, ...]:
        """The keys in the order in which the scripts of a job's record take them."""
        return self.record, self.queued, self.running, self.due, self.dead, self.ended, self.waiters


@dataclass(frozen=True, slots=True)
class FleetKeys:
    """The keys of what a namespace's fleet knows; all of them in one slot."""

    namespace: str

    @property
    def tag(self) -> str:
        """What all of them begin with."""
        return f"{{{self.namespace}}}"

    @property
    def circuits(self) -> str:
        """The circuits there are: JSON arrays of provider and tier."""
        return f"{self.tag}:breakers"

    @property
    def calls(self) -> str:
        """The calls under way, by the end of their lease; past it are calls whose worker died or cannot settle them."""
        return f"{self.tag}:calls"

    @property
    def stages(self) -> str:
        """The places that have called models: JSON arrays of workflow and stage."""
        return f"{self.tag}:stages"

    @property
    def workers(self) -> str:
        """The leases of the workers, by their ends."""
        return f"{self.tag}:workers"

    @property
    def sweep(self) -> str:
        """Since when leases have been watched without a gap."""
        return f"{self.tag}:sweep"

    @property
    def ledger(self) -> str:
        """The cost record of every call."""
        return f"{self.tag}:ledger"

    @property
    def sweeper(self) -> str:
        """Which worker sends what is due."""
        return f"{self.tag}:sweeper"

    @property
    def auth(self) -> str:
        """The auth strategy, where the fleet shares it."""
        return f"{self.tag}:auth"

    @property
    def auth_lines(self) -> str:
        """How many tokens jobs have used for a line of code."""
        return f"{self.tag}:auth:lines"

    def circuit(self, provider: str, tier: str | None) -> str:
        """Return the key of one circuit; without ``tier``, of the provider's own."""
        return f"{self.tag}:breaker:{part(provider)}:{part(tier)}"

    def limits(self, provider: str, model_id: str | None = None, credential: str = DEFAULT_CREDENTIAL) -> str:
        """Return the key of what a provider, or one of its models by one key, has left and when it may be called."""
        base = f"{self.tag}:limits:{part(provider)}"
        if model_id is None:
            return base
        own = "" if credential == DEFAULT_CREDENTIAL else f":{part(credential)}"
        return f"{base}:{part(model_id)}{own}"

    def credential(self, provider: str, name: str) -> str:
        """Return the key of what is known of one of a provider's keys."""
        return f"{self.tag}:credential:{part(provider)}:{part(name)}"

    def slots(self, provider: str) -> str:
        """Return the key of the calls that a provider is serving."""
        return f"{self.tag}:slots:{part(provider)}"

    def budget(self, tenant: str | None, workflow: str | None, provider: str | None, per: str) -> str:
        """Return the key of one budget; None: it is not about that."""
        return f"{self.tag}:budget:{part(tenant)}:{part(workflow)}:{part(provider)}:{per}"

    def call(self, call_id: str) -> str:
        """Return the key of one call's intent and settlement."""
        return f"{self.tag}:call:{_part_of_id(call_id)}"

    def job_calls(self, job_id: str) -> str:
        """Return the key of the ids of a job's calls."""
        return f"{self.tag}:jobcalls:{_part_of_id(job_id)}"

    def costs(self, day: str) -> str:
        """Return the key of a day's sums (``day`` like 20261123)."""
        return f"{self.tag}:costs:{day}"

    def stats(self, workflow: str, stage: str, day: str) -> str:
        """Return the key of a day's counters (``day`` like 20261123)."""
        return f"{self.tag}:stats:{part(workflow)}:{part(stage)}:{day}"

    def evidence(self, workflow: str | None = None, stage: str | None = None) -> str:
        """Return the key of what is known of the models in one stage, in one workflow, or everywhere."""
        names = [part(name) for name in (workflow, stage) if name is not None]
        return ":".join([f"{self.tag}:evidence", *names])


def _part_of_id(name: str) -> str:
    """Return what ``part`` does, for names that come once: they would crowd out those that it remembers."""
    return name if _PLAIN.fullmatch(name) else part(name)


_PLAIN = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_PART}}}")
"""Encoded, these stay as they are."""


@lru_cache(maxsize=4096)
def part(name: str | None) -> str:
    """Return ``name`` as a part of a key; None is ``*``. No two names give the same part."""
    if name is None:
        return "*"
    raw = name.encode(errors="surrogatepass")
    encoded = quote(raw, safe="").replace("~", "%7E")
    return encoded if len(encoded) <= MAX_PART else f"~{hashlib.blake2b(raw, digest_size=20).hexdigest()}"


def shards(namespace: str) -> list[ShardKeys]:
    """Return the indexes of all shards."""
    return [ShardKeys(namespace, shard) for shard in range(SHARDS)]


def shard_of(job_id: str) -> int:
    """Return the shard, 0 to ``SHARDS`` - 1, that a job's keys live in."""
    return crc32(job_id.encode(errors="surrogatepass")) % SHARDS


def job_in(shard: ShardKeys, raw: bytes) -> str | None:
    """Return the job id that an entry of this shard's indexes stands for; None: somebody else wrote it."""
    try:
        job_id = raw.decode(errors="surrogatepass")
    except UnicodeDecodeError:
        return None
    return job_id if shard_of(job_id) == shard.shard else None


def inbox(namespace: str, client: str) -> str:
    """Return the channel on which a client hears that jobs it waits for have ended."""
    return f"{{{namespace}}}:inbox:{client}"


def new_job_id() -> str:
    """Return a random job id."""
    return str(uuid4())


def idempotent_job_id(namespace: str, tenant: str | None, key: str) -> str:
    """Return the job id that an idempotency key stands for: same namespace, tenant and key, same id."""
    name = json.dumps([namespace, tenant, key]).encode()
    return str(UUID(bytes=hashlib.sha256(name).digest()[:16]))
