"""Processes on machines: Ray, started or joined, and gangs of workers on it."""
