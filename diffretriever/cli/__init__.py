"""The command `diffretriever`, one module a sub-command."""
