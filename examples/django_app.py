"""The web backend of ``fastapi_app.py`` in Django, in one file.

python examples/django_app.py runserver         (beside it: attune-worker worker)
gunicorn --chdir examples django_app:application
"""

import json
import os
import sys
from typing import Any

from django.conf import settings
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.http import require_GET, require_POST

from attune_worker import Client, InvalidJobError, JobNotFoundError, ResultTimeoutError, ServiceUnavailableError

SYSTEM = "Summarize the text in two sentences."
WAIT_SECONDS = float(os.environ.get("WAIT_SECONDS", "20"))

settings.configure(
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    ROOT_URLCONF=__name__,
    SECRET_KEY=os.environ.get("DJANGO_SECRET_KEY", "only for trying it out"),
)

client = Client()  # one for the process: it is safe for threads, and for servers that fork


@require_POST
def summarize(request: HttpRequest) -> JsonResponse:
    """Submit a job and wait a while for its answer."""
    try:
        text = json.loads(request.body)["text"]
        job = client.submit("summarize", text, system=SYSTEM)
    except (ValueError, TypeError, KeyError):
        return JsonResponse({"error": 'the body must be {"text": "..."}'}, status=400)
    except InvalidJobError as error:
        return JsonResponse({"error": str(error)}, status=422)
    except ServiceUnavailableError as error:
        return JsonResponse({"error": str(error)}, status=503)
    return _answer(job.id, WAIT_SECONDS)


@require_GET
def show_job(_: HttpRequest, job_id: str) -> JsonResponse:
    """Return the answer of a job, or how far it is."""
    return _answer(job_id, 0)


def _answer(job_id: str, wait_seconds: float) -> JsonResponse:
    try:
        result = client.result(job_id, wait_seconds)
    except ResultTimeoutError:
        return JsonResponse({"job_id": job_id, "status": client.status(job_id)}, status=202)
    except JobNotFoundError as error:
        return JsonResponse({"error": str(error)}, status=404)
    except ServiceUnavailableError as error:
        return JsonResponse({"error": str(error)}, status=503)
    shown = {"job_id", "status", "content", "model_id", "cost_usd", "error"}
    body: dict[str, Any] = result.model_dump(mode="json", include=shown, exclude_none=True)
    return JsonResponse(body, status=200 if result.succeeded else 502)


urlpatterns = [path("summarize", summarize), path("jobs/<str:job_id>", show_job)]
application = get_wsgi_application()

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
