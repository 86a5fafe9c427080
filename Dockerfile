# Images of the server, by target: cpu (the default), gpu, jetson; and loadtest. docs/deploy.md says how to build and
# run them, and how to pin the bases by digest. BuildKit or buildah: they build the stages of a target and no others.
ARG PYTHON_IMAGE=docker.io/library/python:3.12-slim-bookworm
# vLLM's version is the one that the engine vllm is written for. On Jetson, an image with vLLM for the board.
ARG VLLM_IMAGE=docker.io/vllm/vllm-openai:v0.33.0

# The wheel, and the server in a virtual environment.
FROM ${PYTHON_IMAGE} AS build
# A compiler that the image has is kept; otherwise its version is the distribution's to say.
# hadolint ignore=DL3008
RUN command -v g++ \
    || { apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*; }
WORKDIR /source
RUN python3 -m venv /opt/osp
# Dependencies first: their layer outlives changes of the code.
COPY pyproject.toml deploy/requirements.py ./
RUN python3 requirements.py onnx > /tmp/requirements.txt \
    && /opt/osp/bin/pip install --no-cache-dir --requirement /tmp/requirements.txt
COPY CMakeLists.txt LICENSE README.md ./
COPY trainer trainer
COPY quant quant
COPY runtime runtime
# A wheel without the native engine would be a slower server that looks the same: the import fails here then.
WORKDIR /
RUN python3 -m venv /opt/builder && /opt/builder/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /source \
    && /opt/osp/bin/pip install --no-cache-dir --no-deps /wheel/*.whl \
    && /opt/osp/bin/python -c "import runtime.native._osp" \
    && /opt/osp/bin/pip check && /opt/osp/bin/pip uninstall --yes pip setuptools

FROM build AS build-loadtest
RUN python3 /source/requirements.py loadtest --only > /tmp/loadtest.txt \
    && /opt/builder/bin/pip --python /opt/osp/bin/python install --no-cache-dir --requirement /tmp/loadtest.txt

# The wheel again, for the Python of vLLM's image.
FROM ${VLLM_IMAGE} AS build-gpu
# hadolint ignore=DL3008
RUN command -v g++ \
    || { apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*; }
COPY . /source
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /source

# vLLM's image with our package and plugin: its own packages stay as they are.
FROM ${VLLM_IMAGE} AS gpu
COPY --from=build-gpu /wheel /wheel
RUN python3 -m pip list --format=freeze > /tmp/constraints.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt /wheel/*.whl \
    && python3 -c "import runtime.native._osp" && rm -r /wheel /tmp/constraints.txt \
    && install -d -o 10001 -g 10001 /cache /models
# torch asks for the user's name when vLLM is imported, and /etc/passwd does not know it (vLLM issue 44548): USER.
ENV OSP_HOST=0.0.0.0 PYTHONUNBUFFERED=1 USER=osp HOME=/cache HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor TRITON_CACHE_DIR=/cache/triton VLLM_CACHE_ROOT=/cache/vllm
LABEL org.opencontainers.image.title="osp-runtime (gpu)" org.opencontainers.image.licenses="Apache-2.0"
USER 10001:10001
WORKDIR /cache
EXPOSE 8000
# vLLM compiles its graphs before the first answer; the server listens meanwhile.
HEALTHCHECK --start-period=60s --interval=10s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["osp"]
CMD ["serve", "--engine", "vllm"]

# Jetson: the same, on the VLLM_IMAGE of your choice. `auto` serves on the Arm cores where the image has no vLLM.
FROM gpu AS jetson
LABEL org.opencontainers.image.title="osp-runtime (jetson)"
CMD ["serve"]

# The load generator.
FROM ${PYTHON_IMAGE} AS loadtest
COPY --from=build-loadtest /opt/osp /opt/osp
RUN install -d -o 10001 -g 10001 /results
ENV PATH=/opt/osp/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/results
LABEL org.opencontainers.image.title="osp-runtime (loadtest)" org.opencontainers.image.licenses="Apache-2.0"
USER 10001:10001
WORKDIR /results
ENTRYPOINT ["osp", "bench", "load"]

# The server: native and ONNX engines, no torch; the last target is the default.
FROM ${PYTHON_IMAGE} AS cpu
COPY --from=build /opt/osp /opt/osp
RUN install -d -o 10001 -g 10001 /cache /models
# The root file system may be read-only: what is downloaded goes to /cache.
ENV PATH=/opt/osp/bin:$PATH OSP_HOST=0.0.0.0 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache
LABEL org.opencontainers.image.title="osp-runtime (cpu)" org.opencontainers.image.licenses="Apache-2.0"
USER 10001:10001
WORKDIR /cache
EXPOSE 8000
HEALTHCHECK --start-period=10s --interval=10s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
# No shell: the server is process 1 and gets the signal itself.
ENTRYPOINT ["osp"]
CMD ["serve"]
