# An image with main.py and its packages for TPU hosts on GKE (launch/gke.sh). Cloud TPU VMs need no image:
# see launch/tpu.sh.
#
#   docker build --build-arg=REVISION="$(git rev-parse HEAD)" --tag=REGION-docker.pkg.dev/P/R/beit_jax .
#
# This file has not been built: there was no Docker engine where it was written.
FROM python:3.12-slim

WORKDIR /opt/beit_jax

# The packages come before the code, so that a change of code does not install them again.
COPY requirements.txt ./
COPY requirements requirements
COPY launch/requirements-tpu.txt launch/
RUN pip install --no-cache-dir -r requirements.txt -r launch/requirements-tpu.txt

COPY . .

# The variables that launch/worker.sh sets. JAX's own coordinator port is open between pods.
ARG REVISION=unknown
ENV BEIT_JAX_REVISION=$REVISION \
    JAX_PLATFORMS=tpu,cpu \
    JAX_COMPILATION_CACHE_DIR=/tmp/jax_cache \
    PYTHONUNBUFFERED=1 \
    TF_CPP_MIN_LOG_LEVEL=2

CMD ["python", "main.py", "--help"]
