"""The profiles that a build's targets name, each made for the checkpoint at hand."""

from __future__ import annotations

from arriero.export.build_file.schema import BuildConfig
from arriero.graphs.checkpoint import Checkpoint
from arriero.profiles.recipe import Profile, load_profile


def fitted_profiles(build: BuildConfig, checkpoint: Checkpoint) -> dict[str, Profile]:
    """Name -> profile. Raises ArrieroError for one that cannot be read, or keeps codes that are not there."""
    quantised, names = checkpoint.quantised, list(checkpoint.tensors)
    return {target.profile: load_profile(target.profile).fitted(quantised, names) for target in build.targets}
