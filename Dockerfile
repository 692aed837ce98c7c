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

# Does this worker take messages? Its event loop touches the file as long as it does; see docs/howto/deploy.md.
HEALTHCHECK --interval=30s --timeout=20s --start-period=30s --retries=3 \
    CMD ["attune-worker", "healthy", "--file", "/tmp/attune-worker.alive"]

CMD ["attune-worker", "worker", "--name", "worker", "--liveness-file", "/tmp/attune-worker.alive"]
