"""A web backend that answers at once when the fleet is quick, and with a job id when it is not.

uvicorn --app-dir examples fastapi_app:app      (beside it: attune-worker worker)
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from attune_worker import (
    AsyncClient,
    AttuneError,
    InvalidJobError,
    JobNotFoundError,
    ResultTimeoutError,
    ServiceUnavailableError,
)

SYSTEM = "Summarize the text in two sentences."
WAIT_SECONDS = float(os.environ.get("WAIT_SECONDS", "20"))
STATUS_OF = {InvalidJobError: 422, JobNotFoundError: 404, ServiceUnavailableError: 503}


class Text(BaseModel):
    """What is to be summarized."""

    text: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep one client for as long as the app runs."""
    async with AsyncClient() as app.state.attune:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/summarize")
async def summarize(body: Text, response: Response) -> dict[str, Any]:
    """Submit a job and wait a while for its answer."""
    job = await app.state.attune.submit("summarize", body.text, system=SYSTEM)
    return await _answer(job.id, response, WAIT_SECONDS)


@app.get("/jobs/{job_id}")
async def show_job(job_id: str, response: Response) -> dict[str, Any]:
    """Return the answer of a job, or how far it is."""
    return await _answer(job_id, response, 0)


@app.exception_handler(AttuneError)
async def refuse(_: Request, error: AttuneError) -> JSONResponse:
    """Say in one line why there is no job."""
    status = next((status for kind, status in STATUS_OF.items() if isinstance(error, kind)), 500)
    return JSONResponse({"error": str(error)}, status)


async def _answer(job_id: str, response: Response, wait_seconds: float) -> dict[str, Any]:
    try:
        result = await app.state.attune.result(job_id, wait_seconds)
    except ResultTimeoutError:
        response.status_code = 202
        return {"job_id": job_id, "status": await app.state.attune.status(job_id)}
    if not result.succeeded:
        response.status_code = 502
    shown = {"job_id", "status", "content", "model_id", "cost_usd", "error"}
    body: dict[str, Any] = result.model_dump(mode="json", include=shown, exclude_none=True)
    return body
