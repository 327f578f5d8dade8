"""The offline commands, one file a subject; `cluster.cli` puts them together. Nothing heavy is imported before a command needs it."""
