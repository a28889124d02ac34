"""From a build file to finished bundles."""
