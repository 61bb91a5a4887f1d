"""The `ept` command, one file per sub-command."""
