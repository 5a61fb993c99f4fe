# An image with all that training and evaluation need. docs/index.md shows how to build and start it.
FROM python:3.12-slim

# Triton and torch.compile compile a small launcher with gcc.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

# torch is built with CUDA 13, which needs driver 580 or newer. For an older driver, choose a torch of
# CUDA 12 and the extra cuda12.
COPY . /opt/fasttrain
RUN pip install --no-cache-dir '/opt/fasttrain[cuda13,eval,tensorboard]'

WORKDIR /workspace
CMD ["fasttrain", "--help"]
