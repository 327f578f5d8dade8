"""Recall channels: each turns a batch of queries into candidate items."""
