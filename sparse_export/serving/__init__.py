"""Bundles behind a production server: Triton's model repositories, deployment files, and `serve`."""
