"""Runs exported networks; under its public name."""

from avit_jax.inference.serving import BadArtifact, Network, load

__all__ = ["BadArtifact", "Network", "load"]
