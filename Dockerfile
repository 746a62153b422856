# moemerge in a container; docs/install.md shows how it is run.
#
#     docker build -t moemerge .                               for the CPU
#     docker build --build-arg DEVICE=cuda -t moemerge:cuda .  for NVIDIA GPUs

ARG BASE=python:3.12-slim

FROM ${BASE} AS build
ARG DEVICE=cpu
WORKDIR /src
COPY constraints.txt .
# Before the package, so that a change of its code keeps this layer. PyPI's torch for Linux is the CUDA build; the +cpu
# in the version refuses it where PyTorch's own index cannot be reached.
RUN version=$(sed -n 's/^torch==//p' constraints.txt) \
    && python -m venv /opt/moemerge \
    && case "$DEVICE" in \
      cpu) set -- "torch==$version+cpu" --extra-index-url https://download.pytorch.org/whl/cpu ;; \
      cuda) set -- "torch==$version" ;; \
      *) echo "DEVICE is $DEVICE; expected cpu or cuda." >&2; exit 2 ;; \
    esac \
    && /opt/moemerge/bin/pip install --no-cache-dir -c constraints.txt "$@"
COPY pyproject.toml README.md LICENSE ./
COPY moemerge moemerge
RUN /opt/moemerge/bin/pip install --no-cache-dir -c constraints.txt '.[gguf]'

FROM ${BASE}
# The cache is open to whoever `docker run --user` names, and USER names them to Python where no such user is known.
RUN useradd --uid 1000 --home-dir /cache --no-create-home moemerge \
    && install -d -m 1777 /cache \
    && install -d -o moemerge -g moemerge /work
COPY --from=build /opt/moemerge /opt/moemerge
ENV HOME=/cache HF_HOME=/cache USER=moemerge PATH=/opt/moemerge/bin:$PATH
USER 1000
WORKDIR /work
VOLUME /cache
ENTRYPOINT ["moemerge"]
CMD ["--help"]
