"""Bundles in a store that many machines share: pushed, listed, pulled."""
