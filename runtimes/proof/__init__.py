"""Parity: metrics, the report over them, its plots."""
