"""Releases on the Hub: what they hold, their cards, checking and pushing them."""
