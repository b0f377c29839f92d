"""Pruned weights in files, and what such files hold."""
