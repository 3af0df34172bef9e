"""Figures, tables and the page made from a finished scan. Needs no torch; only the figures need matplotlib."""
