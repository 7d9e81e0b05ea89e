"""Copies a run's record to a tracker (MLflow) from a process of its own, so that training never waits for it."""

from .start import (
    NoCredentials,
    ShipperHandle,
    hand_down_password,
    inputs_of,
    later,
    read_state,
    send_apart,
    start_shipper,
    tracking_uri,
    unsent,
)
from .tracker import Input, Point, RunInfo, Sent, Tracker

__all__ = [
    "Input",
    "NoCredentials",
    "Point",
    "RunInfo",
    "Sent",
    "ShipperHandle",
    "Tracker",
    "hand_down_password",
    "inputs_of",
    "later",
    "read_state",
    "send_apart",
    "start_shipper",
    "tracking_uri",
    "unsent",
]
