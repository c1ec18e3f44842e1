"""Explorers: notebooks' widgets over the same probes, statistics and plots."""
