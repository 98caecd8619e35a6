# main.py and what it needs on TPU hosts, for GKE (launch/gke.sh). Cloud TPU VMs do without: launch/tpu.sh.
#
#   docker build --build-arg=REVISION="$(git rev-parse HEAD)" --tag=REGION-docker.pkg.dev/P/R/beit_jax .
#
# Not built where it was written: no Docker engine there.
FROM python:3.12-slim

WORKDIR /opt/beit_jax

# Before the code, so that a change of code does not install everything again.
COPY requirements.txt ./
COPY requirements requirements
COPY launch/requirements-tpu.txt launch/
RUN pip install --no-cache-dir -r requirements.txt -r launch/requirements-tpu.txt

COPY . .

# As launch/worker.sh sets them; jax's own coordinator port is open between pods.
ARG REVISION=unknown
ENV BEIT_JAX_REVISION=$REVISION \
    JAX_PLATFORMS=tpu,cpu \
    JAX_COMPILATION_CACHE_DIR=/tmp/jax_cache \
    PYTHONUNBUFFERED=1 \
    TF_CPP_MIN_LOG_LEVEL=2

CMD ["python", "main.py", "--help"]
