"""Mixture-of-Experts: routers, experts, load balancing, and upcycling from a dense model."""
