# An image with every package at the version of uv.lock: `docker build -t baretune .`, and then
# `docker run --gpus all --ipc host -v "$PWD/runs:/app/runs" baretune torchrun --standalone --nproc-per-node gpu launch/train.py`.
# The CUDA libraries come with torch; the host needs a driver and the NVIDIA container toolkit.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# gcc: torch.compile and triton build kernels at run time
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir uv==0.13.9

WORKDIR /app
ENV UV_LINK_MODE=copy UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never
COPY pyproject.toml uv.lock README.md ./
# names of extras, as in pyproject.toml: --build-arg EXTRAS="--extra bnb --extra liger"
ARG EXTRAS=""
# shellcheck disable=SC2086
RUN uv sync --locked --no-dev --no-install-project ${EXTRAS}

COPY algorithms algorithms
COPY launch launch
COPY models models
COPY train train

ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1
CMD ["python", "launch/doctor.py"]
