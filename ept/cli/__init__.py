"""The `ept` command, one file a sub-command."""
