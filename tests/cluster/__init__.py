"""Tests of training, stores, registry and command line."""
