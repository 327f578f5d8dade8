"""Tests of the pure layer: no Ray, no network."""
