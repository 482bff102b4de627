"""Accelerated backends of ordered attention; everything runs without them, only slower."""
