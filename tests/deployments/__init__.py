"""Tests of the service, over real HTTP on 127.0.0.1."""
