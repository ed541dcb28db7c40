# A server for Jetson Orin and Thor on JetPack 7.2 (CUDA 13.2, TensorRT 10.16, Python 3.12), and for DGX Spark.
#
# Never built and never run: no Jetson was at hand. JetPack 7.2 runs the images of Arm servers (SBSA). The tag is named by
# public projects for JetPack 7.2; it could not be pulled here, so it has no digest. TensorRT 10.16.1.11 is what NVIDIA's
# index for Ubuntu is said to have beside JetPack 7.2's own 10.16.2.10 (--build-arg TENSORRT=10.16.2.10-1+cuda13.2); neither
# was tried. TensorRT 10.13.3, of JetPack 7.1, has no kernels for Orin.
#
#   docker build -f containers/jetpack7.Dockerfile -t tango-edge:jetpack7 .
#
# containers/README.md says how to run it.
FROM nvcr.io/nvidia/cuda:13.2.1-devel-ubuntu24.04

ARG TENSORRT=10.16.1.11-1+cuda13.2
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        cmake g++ python3-pip python3-venv \
        "libnvinfer10=$TENSORRT" "libnvinfer-plugin10=$TENSORRT" "libnvonnxparsers10=$TENSORRT" \
        "libnvinfer-headers-dev=$TENSORRT" "python3-libnvinfer=$TENSORRT" \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 --groups video tango

# Where `tango plugin build` installs, and where the library is looked for.
ENV PATH=/opt/tango/bin:$PATH \
    XDG_DATA_HOME=/opt/tango/share

# With the system's packages, for TensorRT.
COPY . /src
RUN python3 -m venv --system-site-packages /opt/tango \
    && pip install --no-cache-dir --constraint /src/constraints.txt '/src[jetpack7,server]' \
    && tango plugin build --architectures 87 110 121

USER 10001
WORKDIR /home/tango
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["tango"]
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--backend", "tensorrt"]
