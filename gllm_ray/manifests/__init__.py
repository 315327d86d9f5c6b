"""Kubernetes manifests of the service: made from its configuration, and checked without a cluster."""
