"""Processes on machines: Ray started or joined, and a gang of workers on it."""
