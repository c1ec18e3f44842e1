"""Judges of the workshop's exercises, one module a session; :mod:`workbench.workshop` says how."""
