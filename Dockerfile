# pumer-compile on the CPU:  docker build -t pumer-compile --build-arg TORCH_INDEX=... .
#                            docker run --rm -v "$PWD:/work" pumer-compile MODEL --schedule vilt-vqa -o model.onnx
FROM python:3.11-slim-bookworm
# An index that has builds of torch for the CPU; without one, pip takes the build with CUDA (gigabytes).
ARG TORCH_INDEX=""
WORKDIR /opt/pumer-compile
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY pumer_compile pumer_compile
RUN pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".[cpu]" \
    && useradd --create-home --uid 1000 pumer
USER 1000
WORKDIR /work
ENTRYPOINT ["pumer-compile"]
CMD ["--help"]
