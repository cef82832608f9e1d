# One image for API, worker, sweep and migrations. The CUDA build of torch brings its own CUDA libraries; the host needs the driver only.
FROM python:3.11.14-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1

# git or compilers are not needed: every dependency has a wheel. tini reaps what a killed run leaves behind.
RUN apt-get update && apt-get install -y --no-install-recommends tini && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY constraints.txt pyproject.toml README.md alembic.ini ./
COPY hscr hscr
COPY service service
COPY worker worker
COPY migrations migrations
# What docker-compose.yml's settings and every format of docs/data.md need. `medical` brings pylibjpeg-libjpeg, which is GPL-3: that is why it
# is an extra and not a dependency; an image that is handed on without it is built with `--build-arg HSCR_EXTRAS=service,s3,data,caption,trace`
# and reads no DICOM and no NIfTI. Others: pyproject.toml.
ARG HSCR_EXTRAS=service,s3,medical,data,caption,trace
RUN pip install --extra-index-url "$TORCH_INDEX" -c constraints.txt -e ".[$HSCR_EXTRAS]"

RUN useradd --uid 10001 --create-home hscr && mkdir -p /data/tmp /models && chown -R hscr /data /models
USER hscr
VOLUME ["/data", "/models"]
EXPOSE 8000
ENTRYPOINT ["tini", "-g", "--"]
CMD ["python", "-m", "service.serve"]
