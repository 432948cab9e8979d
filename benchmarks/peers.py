"""What other implementations of every family share."""

from __future__ import annotations


class PeerMissingError(Exception):
    """The peer is not installed; the message says how to install it."""
