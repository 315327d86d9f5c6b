"""The serving scheduler in virtual time: models, devices, links, workloads, and their report."""
