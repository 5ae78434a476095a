# The inference server. Weights are mounted, not baked in:
#   docker build -t medimg .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/checkpoints:/models:ro" medimg
FROM python:3.11-slim AS build
# Where torch comes from; the index of its CPU wheels leaves 3 GB of CUDA libraries out (docs/deploy.md).
ARG TORCH_INDEX=""
WORKDIR /build
RUN python -m venv /venv
COPY requirements.txt constraints.txt ./
RUN if [ -n "$TORCH_INDEX" ]; then \
      /venv/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" torch torchvision && \
      /venv/bin/pip install --no-cache-dir -r requirements.txt; \
    else \
      /venv/bin/pip install --no-cache-dir -r requirements.txt -c constraints.txt; \
    fi

FROM python:3.11-slim
# Nothing is written but logs to stdout; nothing is asked of any hub; OpenMP threads sleep while they wait.
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NO_ALBUMENTATIONS_UPDATE=1 \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    DO_NOT_TRACK=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    OMP_WAIT_POLICY=PASSIVE
COPY --from=build /venv /venv
WORKDIR /app
COPY *.py LICENSE ./
COPY web web
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["python", "main.py"]
CMD ["api", "--checkpoint", "/models/best_model.pth", "--host", "0.0.0.0", "--port", "8000"]
