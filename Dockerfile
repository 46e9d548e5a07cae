# llamaserve in a container. Build it on the machine it is to run on, or on one with the same processor:
#
#   docker build -t llamaserve .
#   docker build -t llamaserve --build-arg WHEELS=cpu .                     ready-made binaries instead of compiling
#   docker build -t llamaserve --build-arg CMAKE_ARGS=-DGGML_NATIVE=OFF .   for any processor of this kind, and slower
#   docker run -p 127.0.0.1:5000:5000 -e LLAMASERVE_API_KEY -v llamaserve-cache:/cache llamaserve run qwen3-4b
#
# More: docs/service.md.

FROM python:3.12-slim AS builder
ARG CMAKE_ARGS=""
ARG WHEELS=""
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/llamaserve
WORKDIR /build
# What is compiled comes first, so that a change of llamaserve does not compile it again.
COPY pyproject.toml ./
RUN binding=$(python -c "import tomllib; wanted = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; \
print(next(each for each in wanted if each.startswith('llama-cpp-python')))") \
    && /opt/llamaserve/bin/pip install --no-cache-dir \
        ${WHEELS:+--extra-index-url "https://abetlen.github.io/llama-cpp-python/whl/$WHEELS" --only-binary llama-cpp-python} \
        "$binding"
COPY README.md LICENSE models.yaml ./
COPY llamaserve ./llamaserve
RUN /opt/llamaserve/bin/pip install --no-cache-dir ".[fast,speech]"

FROM python:3.12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home llamaserve \
    && mkdir /cache /models /state \
    && chown llamaserve: /cache /state
COPY --from=builder /opt/llamaserve /opt/llamaserve
# A container's loopback address is reached by nobody else, so the server listens on all; it starts with a key only.
ENV PATH=/opt/llamaserve/bin:$PATH \
    LLAMASERVE_HOST=0.0.0.0 \
    LLAMASERVE_PORT=5000 \
    LLAMASERVE_MODELS_DIR=/models \
    LLAMASERVE_CACHE=/cache/llamaserve \
    LLAMASERVE_STATE_DIR=/state \
    HF_HOME=/cache/huggingface \
    XDG_DATA_HOME=/state \
    PYTHONUNBUFFERED=1
USER llamaserve
WORKDIR /home/llamaserve
VOLUME ["/cache", "/state"]
EXPOSE 5000
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["python", "-m", "llamaserve.service.health"]
ENTRYPOINT ["llamaserve"]
CMD ["run"]
