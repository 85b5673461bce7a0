"""Shared helpers: files, formats, argument checks, timer, metrics, versions of diffusers and torch."""
