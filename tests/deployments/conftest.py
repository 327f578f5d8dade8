"""Imports Ray Serve once, outside of any test: its own module still speaks pydantic's old dialect, and warnings are errors."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401
