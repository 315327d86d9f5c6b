"""Kubernetes manifests: made from a configuration, and checked without a cluster."""
