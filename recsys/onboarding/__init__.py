"""From files that nobody has described to a configuration with its reasons: what `rayfunnel init` does."""

from recsys.onboarding.draft import Draft, draft

__all__ = ["Draft", "draft"]
