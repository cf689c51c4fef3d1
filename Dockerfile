# The package on a CPU, everything from the package index. On Linux the index's torch is the CUDA build, which works
# without a GPU but is large; for the small one name PyTorch's CPU wheels:
#
#   docker build -t megatron-ext --build-arg PIP_EXTRA_INDEX_URL=<index of PyTorch's CPU wheels> .
#   docker run -it --shm-size=1g megatron-ext bash examples/quickstart.sh
#
# `--target base` is the environment without the package: the development container builds on it.

FROM python:3.12-slim-bookworm AS base
# g++: torch compiles fused functions when they are first called. git and make: for work on the sources.
# Versions are those of the image's Debian release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 --shell /bin/bash user \
    && install --directory --owner=user /megatron-ext
WORKDIR /megatron-ext

FROM base AS run
ARG PIP_EXTRA_INDEX_URL=""
ARG EXTRAS="data,hf,lora,quantization,plots"
COPY --chown=user . .
RUN pip install --no-cache-dir -c constraints.txt -e ".[${EXTRAS}]"
USER 1000
CMD ["bash"]
