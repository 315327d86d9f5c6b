"""The serving scheduler in virtual time: workloads, and what a simulation of them measures."""
