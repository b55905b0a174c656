"""Files that appear whole or not at all, locks, claims, lines of compressed files, JSON, hashes."""
