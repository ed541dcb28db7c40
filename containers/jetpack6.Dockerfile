# A server for Jetson Orin on JetPack 6.2: CUDA 12.6, TensorRT 10.3, Python 3.10.
#
# Never built and never run: no Jetson was at hand. The tag r36.4.0 is named by several public projects; it could not be
# pulled here, so it has no digest. It is JetPack 6.1's, and has the CUDA and TensorRT of 6.2.
#
#   docker build -f containers/jetpack6.Dockerfile -t tango-edge:jetpack6 .
#
# containers/README.md says how to run it.
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0

RUN apt-get update \
    && apt-get install --yes --no-install-recommends cmake g++ python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 --groups video tango

# Where `tango plugin build` installs, and where the library is looked for.
ENV PATH=/opt/tango/bin:/usr/local/cuda/bin:$PATH \
    XDG_DATA_HOME=/opt/tango/share

# With the JetPack's packages, for its TensorRT.
COPY . /src
RUN python3 -m venv --system-site-packages /opt/tango \
    && pip install --no-cache-dir --constraint /src/constraints.txt '/src[jetpack6,server]' \
    && tango plugin build --architectures 87

USER 10001
WORKDIR /home/tango
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["tango"]
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--backend", "tensorrt"]
