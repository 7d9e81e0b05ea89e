"""Make the bucket of MLflow's artifacts where it is not there yet: `python make_bucket.py NAME`.

The store is MLFLOW_S3_ENDPOINT_URL; its keys are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, as MLflow reads them.
"""

import os
import sys
import time

import boto3
from botocore.exceptions import ClientError, ConnectionError

PATIENCE = 120.0
"""Seconds for a store that starts at the same time."""


def main(bucket: str) -> None:
    s3 = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            s3.create_bucket(Bucket=bucket)
            print(f"made the bucket {bucket}")
            return
        except s3.exceptions.BucketAlreadyOwnedByYou:
            print(f"the bucket {bucket} is there")
            return
        except (ConnectionError, ClientError) as error:
            refused = isinstance(error, ClientError) and error.response["ResponseMetadata"]["HTTPStatusCode"] < 500
            if refused or time.monotonic() > deadline:
                raise
            time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1])
