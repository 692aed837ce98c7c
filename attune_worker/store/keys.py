"""Which keys are there in Redis, of what type, in which slot, and for how long?

===========  ======  =================================  ==============================================
key          type    name                               lifetime
===========  ======  =================================  ==============================================
record       hash    ``{ns:07}:job:<id>``               none until the job ends (an accepted job must
                                                        not vanish), then the retention time
queued       zset    ``{ns:07}:queued``                 none; an entry leaves when its job is claimed
                                                        or ends. Score: time of acceptance, ms
running      zset    ``{ns:07}:running``                none; an entry leaves when its job ends.
                                                        Score: end of the lease, ms
waiters      set     ``{ns:07}:waiters:<id>``           an hour after the last client began to wait;
                                                        gone when the job ends
inbox        channel ``{ns}:inbox:<client>``            pub/sub, kept nowhere
===========  ======  =================================  ==============================================

Jobs are spread over ``SHARDS`` shards by a checksum of their id; all of a job's keys share the tag of
its shard, and so one slot of a Redis Cluster.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from uuid import UUID, uuid4
from zlib import crc32

SHARDS = 16
"""Fixed: a job's shard follows from its id alone, so changing it would orphan the records there are."""


@dataclass(frozen=True, slots=True)
class JobKeys:
    """The keys of one job."""

    record: str
    queued: str
    running: str
    waiters: str

    @classmethod
    def of(cls, namespace: str, job_id: str) -> JobKeys:
        """Return the keys of ``job_id``."""
        tag = f"{{{namespace}:{shard_of(job_id):02d}}}"
        return cls(
            record=f"{tag}:job:{job_id}",
            queued=f"{tag}:queued",
            running=f"{tag}:running",
            waiters=f"{tag}:waiters:{job_id}",
        )


def shard_of(job_id: str) -> int:
    """Return the shard, 0 to ``SHARDS`` - 1, that a job's keys live in."""
    return crc32(job_id.encode(errors="surrogatepass")) % SHARDS


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
