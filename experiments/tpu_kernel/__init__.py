"""The TPU kernel, compiled for chips that are not at hand; its speed, estimated."""
