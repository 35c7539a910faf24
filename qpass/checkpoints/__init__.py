"""Checkpoints: files that others wrote, and our own, as QWeights; every foreign byte is checked here before it is used."""
