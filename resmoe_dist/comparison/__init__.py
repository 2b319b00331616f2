"""Compression methods side by side on one model: `resmoe-dist compare`."""
