"""Releases in other engines: what goes to a server, and vectors that come from one."""
