# syntax=docker/dockerfile:1
# MinIO as an unprivileged user, for compose: a new volume takes the owner of the folder that it is mounted on.
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS folder
RUN install -d -o 1000 -g 1000 -m 700 /srv/minio

FROM quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z
COPY --from=folder --chown=1000:1000 /srv/minio /srv/minio
USER 1000:1000
