# One image for every pod and for a single machine. Build it from the repository's root; with
# --target sglang it also holds SGLang's own Python environment for target replicas on GPUs.
FROM python:3.11-slim AS paceline

# KubeRay's probes call wget; Ray's tools look at processes with ps.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends procps wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 paceline

WORKDIR /app

# The dependencies change less often than the code, so they are a layer of their own.
COPY pyproject.toml README.md LICENSE ./
COPY .constraints .constraints
RUN mkdir cluster deployments kv_store protos \
    && touch cluster/__init__.py deployments/__init__.py kv_store/__init__.py protos/__init__.py \
    && pip install --no-cache-dir -c .constraints/core.txt -e '.[train]'

COPY protos protos
COPY kv_store kv_store
COPY deployments deployments
COPY cluster cluster

# The SSD tier's folder belongs to the user that writes it, also when nothing is mounted there.
RUN install --directory --owner=paceline --group=paceline /var/lib/paceline/kv
USER paceline

# The default model's weights and its small draft become part of the image: pods start without
# fetching or fitting anything.
RUN paceline fetch

ENV RAY_USAGE_STATS_ENABLED=0
EXPOSE 8000 9000
CMD ["paceline", "serve"]

# engine.sglang.python: /opt/sglang-venv/bin/python. Ray and Python are of the cluster's own versions.
FROM paceline AS sglang
USER root
RUN python -m venv /opt/sglang-venv \
    && /opt/sglang-venv/bin/pip install --no-cache-dir sglang==0.5.23 \
    && /opt/sglang-venv/bin/pip install --no-cache-dir "ray[serve]==2.60.0" blake3 cryptography grpcio \
        grpcio-health-checking grpcio-reflection opentelemetry-api opentelemetry-sdk \
        opentelemetry-exporter-otlp-proto-grpc redis gguf numba xxhash zstandard
USER paceline

# What is built without --target.
FROM paceline
