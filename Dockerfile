# The image of a worker. The same image runs Flower and the simulator: see docker-compose.yml.
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY attune_worker ./attune_worker
RUN pip install . \
    && rm -rf /src/* \
    && useradd --system --uid 10001 --home-dir /app --create-home --shell /usr/sbin/nologin attune

# An attune.toml in this folder is read; keys and passwords come by environment, never in the image.
WORKDIR /app
USER attune

# Does this worker answer on the broker? It is asked by name, so no other worker can answer for it.
HEALTHCHECK --interval=60s --timeout=20s --start-period=30s --retries=3 \
    CMD celery -A attune_worker inspect ping --timeout 10 --destination "worker@$(hostname)"

CMD ["attune-worker", "worker", "--name", "worker"]
