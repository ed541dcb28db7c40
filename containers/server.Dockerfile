# A server for x86-64 with NVIDIA GPUs, on ONNX Runtime's CUDA provider: CUDA 13.0, cuDNN 9, Python 3.12.
#
# Never built. The tags are named by public projects; they could not be pulled here, so they have no digest.
#
#   docker build -f containers/server.Dockerfile -t tango-edge:server .
#
# containers/README.md says how to run it.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04 AS build

RUN apt-get update \
    && apt-get install --yes --no-install-recommends cmake g++ python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/tango/bin:$PATH \
    XDG_DATA_HOME=/opt/tango/share

COPY . /src
RUN python3 -m venv /opt/tango \
    && pip install --no-cache-dir --constraint /src/constraints.txt '/src[gpu,server]' \
    && tango plugin build

FROM nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 tango

ENV PATH=/opt/tango/bin:$PATH \
    XDG_DATA_HOME=/opt/tango/share

COPY --from=build /opt/tango /opt/tango

USER 10001
WORKDIR /home/tango
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["tango"]
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--backend", "ort-cuda"]
