# syntax=docker/dockerfile:1
# MLflow's server with PostgreSQL's and S3's clients, from the repository's root:
#
#   docker build -f deploy/docker/mlflow.Dockerfile -t muster-mlflow:3.17.2 .
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
COPY deploy/hashes/mlflow.txt /src/
WORKDIR /src
RUN python -m venv /opt/mlflow \
    && /opt/mlflow/bin/pip install --no-cache-dir --disable-pip-version-check \
        --no-deps --require-hashes -r mlflow.txt

FROM ${PYTHON}
RUN useradd --uid 1000 --create-home mlflow
COPY --from=build /opt/mlflow /opt/mlflow
ENV PATH=/opt/mlflow/bin:$PATH PYTHONUNBUFFERED=1 \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
WORKDIR /home/mlflow
USER 1000:1000
EXPOSE 5000
CMD ["mlflow", "server", "--help"]
