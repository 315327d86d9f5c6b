"""The pipeline in virtual time: models, devices, links, and what a micro-batch costs on them."""
